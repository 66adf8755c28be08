"""An encode and a language worker in this process, joined by one transport, called through their HTTP applications."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import torch

from embferry.cache.contract import Store
from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel
from embferry.engine.reference import Reference
from embferry.engine.sampling import SamplingParams
from embferry.models import model_path
from embferry.serve.config import (
    CacheSettings,
    EncodeSettings,
    LanguageSettings,
    MediaSettings,
    Settings,
    TransferSettings,
)
from embferry.serve.encode import process as encode_process
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.encode.preparation import prepare
from embferry.serve.http.calls import is_streamed
from embferry.serve.language import process as language_process
from embferry.transports.contract import Transport
from tests.serve.digested import digested, lines_of

DEADLINE = 100.0
"""Seconds after which a test counts as hanging."""
CHUNK = 48
"""Tokens of a prefill step. Each prompt here needs several, so prefill begins before the embedding is complete."""


@dataclass(frozen=True)
class Models:
    """The packaged model, in its two halves and undivided."""

    encoder: Encoder
    language: LanguageModel
    undivided: Reference

    @classmethod
    def load(cls) -> Models:
        path, dtype = model_path("shapes"), torch.float32
        language = LanguageModel.load(path, dtype, prefill_chunk_tokens=CHUNK)
        return cls(Encoder.load(path, dtype), language, Reference.load(path, dtype, prefill_chunk_tokens=CHUNK))


def settings_for(
    num_blocks: int = 4,
    block_size: int = 4,
    *,
    encode: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    media: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    **transfer: Any,
) -> Settings:
    return Settings(
        transfer=TransferSettings(num_blocks=num_blocks, block_size=block_size, **transfer),
        encode=EncodeSettings(**(encode or {})),
        language=LanguageSettings(prefill_chunk_tokens=CHUNK, **(language or {})),
        media=MediaSettings(**(media or {})),
        cache=CacheSettings(**(cache or {})),
    )


class Joined:
    """Two joined workers. A context manager: at its end it checks that no block is lost, and stops all threads."""

    def __init__(
        self, models: Models, transport: type[Transport], settings: Settings, store: Store | None = None
    ) -> None:
        self.models = models
        self.settings = settings
        self.language = language_process.service_of(models.language, settings, [transport()])
        self.encode = encode_process.service_of(models.encoder, settings, [transport()], store)
        self.language_app = language_process.build(self.language)
        self.encode_app = encode_process.build(self.encode)

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait(lambda: self.language.pool()["available"] == self.settings.transfer.num_blocks)
                self.wait(lambda: self.encode.load == 0)
                self.language.manager.allocator.check_integrity()
                assert self.encode.fault is None
                assert self.language.fault is None
        finally:
            self.encode.close()
            self.language.close()

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true"
            time.sleep(0.002)

    # The calls of a router

    async def post_encode(self, *items: dict[str, Any], room: int | None = None, whose: str = "") -> httpx.Response:
        room = secrets.randbits(60) if room is None else room
        body = msgspec.msgpack.encode({"room": room, "request_id": "test", "items": items, "client": whose})
        async with client(self.encode_app) as http:
            return whole(await http.post("/encode", content=body))

    async def post_generate(self, body: dict[str, Any]) -> httpx.Response:
        async with client(self.language_app) as http:
            return await http.post("/generate", json=body)

    async def ask(self, question: str, *items: dict[str, Any], **sampling: Any) -> Answer:
        """Sends one request through both workers."""
        encoded: dict[str, Any] = {"room": None, "endpoint": None, "items": []}
        if items:
            response = await self.post_encode(*items)
            assert response.status_code == 200, response.text
            encoded = response.json()
        response = await self.post_generate(generate_body(encoded, question, **sampling))
        return Answer(response.status_code, events(response))

    def reference(self, question: str, *items: dict[str, Any], max_tokens: int = 16) -> list[int]:
        """Returns the tokens of the undivided model for the same request."""
        prepared = prepare([EncodeItem(**item) for item in items], self.models.encoder.media, self.settings.media)
        body = generate_body({"items": [{"kind": item.kind} for item in prepared]}, question)
        chat = [{"role": m["role"], "content": m["parts"]} for m in body["messages"]]
        prompt = self.models.language.prompts.build(chat, [item.shape for item in prepared])
        return self.models.undivided.run(prompt, prepared, SamplingParams(max_tokens=max_tokens)).tokens


@dataclass(frozen=True)
class Answer:
    status: int
    events: list[dict[str, Any]]

    @property
    def tokens(self) -> list[int]:
        return [event["token_id"] for event in self.events if event["type"] == "token"]

    @property
    def text(self) -> str:
        return "".join(event["text"] for event in self.events if event["type"] == "token")

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]


def generate_body(encoded: dict[str, Any], question: str, **sampling: Any) -> dict[str, Any]:
    """Returns a body for ``/generate`` from the response of ``/encode``."""
    parts: list[dict[str, Any]] = [{"type": item["kind"], "item": index} for index, item in enumerate(encoded["items"])]
    return {
        "room": encoded.get("room"),
        "request_id": "test",
        "endpoint": encoded.get("endpoint"),
        "messages": [{"role": "user", "parts": [*parts, {"type": "text", "text": question}]}],
        "items": encoded["items"],
        "sampling": {"max_tokens": 16, **sampling},
    }


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=DEADLINE, auth=digested)


def whole(response: httpx.Response) -> httpx.Response:
    """Returns an encode worker's response as the router reads it, also one that began with signs of life."""
    if not is_streamed(response):
        return response
    content = json.loads(lines_of(response)[-1])
    return httpx.Response(content.get("error", {}).get("status", 200), json=content, request=response.request)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Returns the events of a response, without pings."""
    if not is_streamed(response):
        return [response.json()]
    lines = [json.loads(line) for line in lines_of(response)]
    return [event for event in lines if event.get("type") != "ping"]


def run(coroutine: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await coroutine

    return asyncio.run(bounded())
