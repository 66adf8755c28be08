"""Workers on the origin's wire in this process, on engine doubles, called as SGLang's load balancer calls them."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.engine.reference import Reference
from embferry.engine.sampling import SamplingParams
from embferry.engine.whole_prompt import text_table
from embferry.models import model_path
from embferry.protocol.layout import Layout
from embferry.serve.config import BootstrapSettings, LanguageSettings, Settings, TransferSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.encode.preparation import prepare
from embferry.serve.origin import encode, language
from embferry.serve.origin.encode_service import OriginEncodeService
from embferry.serve.origin.language_service import OriginLanguageService
from embferry.serve.origin.managers import encode_manager, language_manager
from tests.disaggregation.mooncake.engine_double import EngineNetwork
from tests.disaggregation.mooncake.origin_peers import BLOCK, BLOCKS

DEADLINE = 100.0
"""Seconds after which a test counts as hanging."""
CHUNK = 48
"""Tokens of a prefill step. Most prompts here need several."""
MAX_TOKENS = 12
PATH, DTYPE = model_path("shapes"), torch.bfloat16


@dataclass(frozen=True)
class Models:
    """The packaged model in bf16, in its parts and undivided."""

    encoder: Encoder
    language: LanguageModel
    undivided: Reference
    prompts: PromptBuilder
    table: torch.Tensor

    @classmethod
    def load(cls) -> Models:
        return cls(
            Encoder.load(PATH, DTYPE),
            LanguageModel.load(PATH, DTYPE, prefill_chunk_tokens=CHUNK),
            Reference.load(PATH, DTYPE, prefill_chunk_tokens=CHUNK),
            PromptBuilder.load(PATH),
            text_table(PATH, DTYPE),
        )

    @property
    def token_bytes(self) -> dict[str, int]:
        return {field.name: field.token_bytes for field in self.encoder.fields}

    def prompt(self, chat: list[dict[str, Any]], *pictures: bytes) -> tuple[Prompt, list[Any]]:
        items = prepare([EncodeItem("image", picture) for picture in pictures], self.encoder.media, Settings().media)
        return self.prompts.build(chat, [item.shape for item in items]), items

    def answer(self, chat: list[dict[str, Any]], *pictures: bytes) -> str:
        """Returns the answer of the undivided model."""
        prompt, items = self.prompt(chat, *pictures)
        tokens = self.undivided.run(prompt, items, SamplingParams(max_tokens=MAX_TOKENS)).tokens
        return str(self.prompts.tokenizer.decode(tokens, skip_special_tokens=True))


def settings_for(**changes: Any) -> Settings:
    """Returns settings for the pool of :mod:`tests.disaggregation.mooncake.origin_peers`."""
    transfer = {"num_blocks": BLOCKS, "block_size": BLOCK, **changes.pop("transfer", {})}
    return Settings(
        dtype="bf16",
        transfer=TransferSettings(**transfer),
        language=LanguageSettings(prefill_chunk_tokens=CHUNK),
        bootstrap=BootstrapSettings(port=0),
        **changes,
    )


class OriginWorkers:
    """An encode and a language worker of ours, either of which a test may leave alone; and a bootstrap server."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.network = models, EngineNetwork()
        with ExitStack() as stack:
            self.bootstrap = stack.enter_context(BootstrapServer())
            layout = Layout(models.encoder.fields)
            sending = encode_manager(layout, settings, self.bootstrap.url, self.network.open)
            self.encode = OriginEncodeService(models.encoder, sending, settings, models.prompts, models.table)
            stack.callback(self.encode.close)
            receiving = language_manager(layout, settings, self.network.open)
            self.language = OriginLanguageService(models.language, receiving, settings)
            stack.callback(self.language.close)
            self.encode_app, self.language_app = encode.build(self.encode), language.build(self.language)
            self._stack = stack.pop_all()

    def __enter__(self) -> OriginWorkers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            if kind is None:
                eventually(lambda: self.encode.load == self.language.load == 0)
                eventually(lambda: self.language.pool()["available"] == BLOCKS)
                assert self.encode.fault is self.language.fault is None
                assert self.encode.budget.held == self.language.budget.held == 0

    async def ask(self, chat: list[dict[str, Any]], *, room: int | None = None, **fields: Any) -> Answer:
        """Does what the load balancer does: asks both at once, the language worker without the media."""
        room = secrets.randbits(63) if room is None else room
        whole = {"model": "shapes", "messages": chat, "max_tokens": MAX_TOKENS} | self.place(room) | fields
        texts = copy.deepcopy(whole)
        for message in texts["messages"]:
            if isinstance(message["content"], list):
                message["content"] = [part for part in message["content"] if part["type"] == "text"]
        async with asyncio.TaskGroup() as tasks:
            encoding = tasks.create_task(post(self.encode_app, whole | {"stream": False}))
            answering = tasks.create_task(post(self.language_app, texts))
        return Answer(encoding.result(), answering.result())

    def place(self, room: int) -> dict[str, Any]:
        return {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap.port,
            "bootstrap_room": room,
            "rid": f"rid-{room}",
        }


@dataclass(frozen=True)
class Answer:
    encoded: httpx.Response
    answered: httpx.Response

    @property
    def text(self) -> str:
        assert self.encoded.status_code == 200, self.encoded.text
        assert self.answered.status_code == 200, self.answered.text
        return str(self.answered.json()["choices"][0]["message"]["content"])

    @property
    def streamed(self) -> str:
        *chunks, last = [line for line in self.answered.text.split("\n\n") if line]
        assert last == "data: [DONE]"
        told = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        return "".join(one["choices"][0]["delta"].get("content", "") for one in told if one["choices"])


async def post(app: Any, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=DEADLINE) as client:
        return await client.post(path, json=body)


def run(coroutine: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await coroutine

    return asyncio.run(bounded())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.002)
