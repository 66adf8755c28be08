"""Stubs of vLLM's instances and a router before them, in one event loop, without sockets.

``Stub`` answers as ``vllm serve`` 0.32 does, unless a test gives it another behaviour. The router is called as an ASGI
application; tests see what it sends at once, and a client can leave in the middle.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from embferry.serve.config import LanguageSettings, MediaSettings, RouterSettings, Settings, VllmSettings
from embferry.serve.vllm.app import build
from tests.serve.digested import digested
from tests.serve.vllm.sound_parts import METADATA

DEADLINE = 60.0
"""Seconds after which an unmet condition fails the test."""
Behaviour = Callable[["Stub", dict[str, Any]], Awaitable[httpx.Response]]
SHAPE = {"tokens": 48, "width": 64, "dtype": "float32", "digest": "00"}
"""Coordinates that every embedding has."""
HOLD = "hold"
"""In a stream: pauses until the test releases it."""
BREAK = "break"
"""In a stream: drops the connection."""


@dataclass
class Stub:
    """One instance.

    Attributes:
        host: its name in URLs.
        behaviours: for the next chat requests, one each; then ``default``, or that of the role.
        holding: set when a request or a stream pauses.
        release: ends every pause.
        left: calls and streams that the router has abandoned.
        silent: probes get no answer in time.
    """

    host: str
    role: str
    models: tuple[str, ...] = ("tiny",)
    up: bool = True
    health: int = 200
    behaviours: list[Behaviour] = field(default_factory=list)
    default: Behaviour | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)
    holding: bool = False
    release: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0
    silent: bool = False

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    async def hold(self) -> None:
        self.holding = True
        await self.release.wait()

    async def chat(self, body: dict[str, Any]) -> httpx.Response:
        default = self.default or (encoded() if self.role == "encode" else answered())
        return await (self.behaviours.pop(0) if self.behaviours else default)(self, body)


class Network(httpx.AsyncBaseTransport):
    """Routes requests to stubs by host."""

    def __init__(self, *stubs: Stub) -> None:
        self.stubs = {stub.host: stub for stub in stubs}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        stub = self.stubs[request.url.host]
        if not stub.up:
            raise httpx.ConnectError("connection refused", request=request)
        if stub.silent and request.method == "GET":
            raise httpx.ReadTimeout("no answer", request=request)
        if request.url.path == "/health":
            return httpx.Response(stub.health)
        if request.url.path == "/v1/models":
            return httpx.Response(
                200, request=request, json={"data": [{"id": name, "object": "model"} for name in stub.models]}
            )
        body = json.loads(await request.aread())
        stub.requests.append(body)
        stub.headers.append(request.headers)
        try:
            return await stub.chat(body)
        except asyncio.CancelledError:
            stub.left += 1
            raise


# Behaviours


def encoded(room: int = 7, **changes: Any) -> Behaviour:
    """Responds as our connector's producer does. ``changes``: to the entry; None removes a field."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        item = body["messages"][0]["content"][0]
        asked = (body.get("ec_transfer_params") or {}).get("embferry") or {}
        coordinates = {"endpoint": f"tcp://{stub.host}:1", "room": asked.get("room", room)}
        coordinates |= SHAPE
        entry: dict[str, Any] = {"item_indices": [0], "metadata": METADATA.get(item["type"]), "embferry": coordinates}
        entry = {key: value for key, value in (entry | changes).items() if value is not None}
        return httpx.Response(200, json={"choices": [], "ec_transfer_params": {item["uuid"]: entry}})

    return behave


def answered(text: str = "a red circle", reason: str = "stop") -> Behaviour:
    """Responds completely, or in a stream if the request wants one."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        if body.get("stream"):
            return await streamed(*events_of(text, reason))(stub, body)
        return httpx.Response(200, json=completion(text, reason))

    return behave


def completion(text: str, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 50, "completion_tokens": 3, "total_tokens": 53}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage}


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}\n\n'


def events_of(text: str, reason: str = "stop") -> list[bytes]:
    """Returns the events of an answer, one a word."""
    words = [b"data: " + json.dumps(_chunk({"content": f"{word} "})).encode() + b"\n\n" for word in text.split()]
    end = b"data: " + json.dumps(_chunk({}, reason)).encode() + b"\n\n"
    return [ROLE, *words, end, DONE]


def _chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def streamed(*events: bytes | str) -> Behaviour:
    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=_Events(stub, events))

    return behave


class _Events(httpx.AsyncByteStream):
    def __init__(self, stub: Stub, events: tuple[bytes | str, ...]) -> None:
        self._stub, self._events, self._left = stub, events, len(events)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self._events:
            if event == BREAK:
                raise httpx.ReadError("connection reset")
            if event == HOLD:
                await self._stub.hold()
            elif isinstance(event, bytes):
                yield event
            self._left -= 1

    async def aclose(self) -> None:
        if self._left:
            self._stub.left += 1


def refused(status: int, **error: Any) -> Behaviour:
    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(status, json={"error": {"message": "no", "type": "x", "code": status, **error}})

    return behave


def lost(error: type[httpx.TransportError] = httpx.ReadError) -> Behaviour:
    """Drops the connection before any answer."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        raise error("connection reset")

    return behave


async def held(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    await stub.hold()
    return await stub.chat(body)


# The router


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error


class Call:
    """One request to the router. ``sent``: the ASGI messages of its response so far."""

    def __init__(self, app: Any, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()
        self._gone = asyncio.Event()
        self._body: bytes | None = body
        scope = {
            "type": "http",
            "method": "POST" if body else "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition`` holds for the messages."""
        async with asyncio.timeout(DEADLINE), self._changed:
            await self._changed.wait_for(condition)

    async def answer(self) -> Answer:
        async with asyncio.timeout(DEADLINE):
            await self.task
        start, *rest = self.sent
        assert not rest[-1].get("more_body")
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, self.body)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._changed:
            self.sent.append(message)
            self._changed.notify_all()


class Router:
    def __init__(self, app: Any) -> None:
        self._app = app

    def call(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Call:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self._app, path, raw, {name.replace("_", "-"): value for name, value in headers.items()})

    async def ask(self, body: Any, **headers: str) -> Answer:
        return await self.call(body, **headers).answer()

    async def post(self, path: str, body: Any) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = digested(httpx.Request("POST", f"http://router{path}", content=content))
        return await self.call(request.content, path, **request.headers).answer()

    async def get(self, path: str) -> Answer:
        return await self.call(b"", path).answer()

    async def until_up(self, **counts: int) -> None:
        """Waits until this many instances are up, by role."""

        async def are_up() -> bool:
            workers = (await self.get("/ready")).json()["workers"]
            return all(workers[role] == count for role, count in counts.items())

        await until(are_up)

    async def counted(self, name: str, labels: str = "", part: str = "router") -> float:
        """Returns a value from ``/metrics``."""
        text = (await self.get("/metrics")).body.decode()
        found = [line.split()[1] for line in text.splitlines() if line.startswith(f"embferry_{part}_{name}{labels} ")]
        assert len(found) == 1, text
        return float(found[0])


@contextlib.asynccontextmanager
async def routed(
    *stubs: Stub,
    media: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    network: httpx.AsyncBaseTransport | None = None,
    **vllm: Any,
) -> AsyncIterator[Router]:
    """Yields a router before these stubs, when it has found those that are up.

    Args:
        stubs: The instances.
        media: Settings of that section.
        router: Settings of that section.
        language: Settings of that section.
        network: Takes requests to the stubs; None: the stubs themselves do.
        vllm: Settings of that section.
    """
    roles = ("encode", "prefill", "decode") if any(s.role == "decode" for s in stubs) else ("encode", "language")
    urls = {f"{role}_urls": tuple(s.url for s in stubs if s.role == role) for role in roles}
    settings = Settings(
        media=MediaSettings(**(media or {})),
        language=LanguageSettings(**(language or {})),
        router=RouterSettings(engine="vllm", **{"poll_interval": 0.01, **(router or {})}),
        vllm=VllmSettings(**urls, **vllm),
    )
    app = build(settings, network or Network(*stubs))
    running, stop = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not running.is_set():
            return {"type": "lifespan.startup"}
        await stop.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: dict[str, Any]) -> None:
        assert message["type"] in ("lifespan.startup.complete", "lifespan.shutdown.complete"), message
        running.set()

    lifespan = asyncio.create_task(app({"type": "lifespan", "state": {}}, receive, send))
    await running.wait()
    found = Router(app)
    await found.until_up(**{role: sum(s.up and s.health == 200 for s in stubs if s.role == role) for role in roles})
    try:
        yield found
    finally:
        stop.set()
        await lifespan


async def until(condition: Callable[[], Any]) -> None:
    """Waits until ``condition``, a function or coroutine function, returns something true."""
    async with asyncio.timeout(DEADLINE):
        while not (await found if inspect.isawaitable(found := condition()) else found):
            await asyncio.sleep(0.001)


def encoder_stubs(count: int) -> list[Stub]:
    """Returns stubs named ``enc0`` to ``enc{count - 1}``."""
    return [Stub(f"enc{number}", "encode") for number in range(count)]


def language_stubs(count: int) -> list[Stub]:
    """Returns stubs named ``lang0`` to ``lang{count - 1}``."""
    return [Stub(f"lang{number}", "language") for number in range(count)]


# Requests


def picture(content: bytes = b"a picture", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}, **more}


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def video(content: bytes = b"a video") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(mp4(content), "video/mp4")}}


def mp4(content: bytes = b"a video") -> bytes:
    """Returns the beginning of a video file, with ``content`` where its frames would be."""
    return b"\0\0\0\x10ftypisom\0\0\0\0" + (8 + len(content)).to_bytes(4) + b"mdat" + content


def text(words: str = "what is there?") -> dict[str, Any]:
    return {"type": "text", "text": words}


def request(*content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **more}
