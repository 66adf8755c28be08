"""A fake bootstrap server, fake workers with scripted answers, and a real router, all on real sockets.

One thread runs one event loop with both servers; tests talk to them from outside. A fake records what it sees in
plain lists, which change under one condition that tests wait on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.serve.config import BootstrapSettings, MediaSettings, RouterSettings, Settings
from embferry.serve.http.digests import Digests
from embferry.serve.http.proofs import line_writer
from embferry.serve.http.serving import KEEP_ALIVE_SECONDS
from embferry.serve.router.app import build
from embferry.serve.worker.errors import error_response
from embferry.trust.digests import LINES, MESSAGE_DIGEST, LineWriter

DEADLINE = 60.0
"""Seconds after which an unmet condition fails the test."""

TRANSFER = {"total_tokens": 64, "initial": 1, "resumed": 7, "bytes": 4096, "transport": "shm"}
USAGE = {"prompt_tokens": 70, "completion_tokens": 3, "total_tokens": 73}
END = {"type": "end", "finish_reason": "stop", "usage": USAGE, "transfer": TRANSFER, "timing": {"prefill": 0.1}}


def tokens(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "token", "text": text, "token_id": 100 + n} for n, text in enumerate(texts)]


NAMES = ("encode0", "encode1", "language0", "language1")

ANSWER: list[Any] = [*tokens("a ", "red ", "circle"), END]
BREAK = "break"
"""In a script: drops the connection."""
DAMAGE = "damage"
"""In a script: an end that is changed on its way."""
FORGE = "forge"
"""In a script: an end as its first line, with the check that a stranger can compute."""
HOLD = "hold"
"""In a script: pauses until the test releases it or the caller leaves."""

BOUNDS = ("connect_timeout", "request_timeout", "stall_timeout")
"""Settings of the router; a test whose subject is one of them makes it short."""

POOL = {"num_blocks": 4, "available": 3, "used": 1, "quarantined": 0}
"""The receive pool of every fake worker."""


@dataclass
class FakeWorker:
    """A worker without a model.

    Attributes:
        script: the events of ``/generate``.
        scripts: scripts for the next requests, one each; then ``script``.
        refusal: (status, body) in place of any answer, or BREAK or HOLD.
        aborted: rooms that the router has aborted.
        holding: requests that are paused.
        left: callers that left during a pause.
    """

    id: str
    role: str
    script: list[Any] = field(default_factory=lambda: list(ANSWER))
    scripts: list[list[Any]] = field(default_factory=list)
    refusal: Any = None
    requests: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    holding: int = 0
    left: int = 0


class Deployment:
    """The servers. ``workers`` is the bootstrap server's list, which tests may replace.

    Args:
        lease: seconds that the router trusts the list.
        media: MediaSettings.
        router: RouterSettings.
    """

    def __init__(self, lease: float = DEADLINE, media: dict[str, Any] | None = None, **router: Any) -> None:
        self.fakes = {name: FakeWorker(name, name.rstrip("0123456789")) for name in NAMES}
        self.changed = threading.Condition()
        self.release = threading.Event()
        self._fake_socket, self._router_socket = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        self.fake_url, self.url = (
            f"http://127.0.0.1:{s.getsockname()[1]}" for s in (self._fake_socket, self._router_socket)
        )
        self.workers = [self.entry("encode0"), self.entry("language0")]
        self.bootstrap_fails, self.list_is_complete = False, True
        settings = {"poll_interval": 0.02, **dict.fromkeys(BOUNDS, DEADLINE)} | router
        self.settings = Settings(
            bootstrap_url=self.fake_url,
            media=MediaSettings(**(media or {})),
            router=RouterSettings(**settings),
            bootstrap=BootstrapSettings(lease=lease),
        )
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def entry(self, name: str, **changes: Any) -> dict[str, Any]:
        """Returns a worker as the bootstrap server lists it."""
        fake = self.fakes[name]
        known = {"id": name, "role": fake.role, "url": f"{self.fake_url}/{name}", "endpoint": "tcp://127.0.0.1:1"}
        return {**known, "model": "shapes", "load": 0, **changes}

    def __enter__(self) -> Deployment:
        self._thread.start()
        assert self._up.wait(DEADLINE), "the servers did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self.release.set()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the servers did not end"

    def get(self, path: str) -> httpx.Response:
        """Returns what the router answers at a path."""
        return httpx.get(f"{self.url}{path}", verify=False, trust_env=False, timeout=DEADLINE)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition`` holds; evaluates it at every change and every few milliseconds.

        Nothing is locked meanwhile: the condition may ask the servers, whose thread takes the lock at every change.
        """
        for _ in range(int(DEADLINE / 0.01)):
            if condition():
                return
            with self.changed:
                self.changed.wait(0.01)
        raise AssertionError("the condition did not come true")

    async def _serve(self) -> None:
        """Runs both servers without uvicorn's signal handlers and main loop, whose pauses would dominate."""
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        servers = [
            await _started(self._app(), self._fake_socket, "off"),
            await _started(build(self.settings), self._router_socket, "on"),
        ]
        self._up.set()
        await self._stop.wait()
        for server in reversed(servers):
            await _stopped(server)

    def _app(self) -> ASGIApp:
        app = Starlette(
            routes=[
                Route("/workers", self._list),
                Route("/{name}/encode", self._encode, methods=["POST"]),
                Route("/{name}/generate", self._generate, methods=["POST"]),
                Route("/{name}/debug/pool", self._pool),
                Route("/{name}/tokenize", self._tokenize, methods=["POST"]),
                Route("/{name}/detokenize", self._detokenize, methods=["POST"]),
                Route("/{name}/rooms/{room:int}", self._abort, methods=["DELETE"]),
            ]
        )
        return Digests(app, error_response, lambda path: True)

    async def _list(self, request: Request) -> Response:
        if self.bootstrap_fails:
            return JSONResponse({}, 500)
        return JSONResponse({"workers": self.workers, "complete": self.list_is_complete})

    async def _pool(self, request: Request) -> Response:
        fake = self.fakes[request.path_params["name"]]
        return await self._refused(fake, request) or JSONResponse(POOL)

    async def _abort(self, request: Request) -> Response:
        with self.changed:
            self.fakes[request.path_params["name"]].aborted.append(request.path_params["room"])
            self.changed.notify_all()
        return Response(status_code=204)

    async def _record(self, request: Request, body: Any) -> FakeWorker:
        fake = self.fakes[request.path_params["name"]]
        with self.changed:
            fake.requests.append(body)
            fake.headers.append(dict(request.headers))
            self.changed.notify_all()
        return fake

    async def _refused(self, fake: FakeWorker, request: Request) -> Response | None:
        if fake.refusal == BREAK:
            return StreamingResponse(_broken(), headers={"content-length": "10"}, media_type=LINES)
        if fake.refusal == HOLD:
            await self._held(fake, request)
            return JSONResponse({}, 500)
        if fake.refusal:
            status, body = fake.refusal
            return Response(body if isinstance(body, str) else json.dumps(body), status)
        return None

    async def _encode(self, request: Request) -> Response:
        body = msgspec.msgpack.decode(await request.body())
        fake = await self._record(request, body)
        if refused := await self._refused(fake, request):
            return refused
        items = [
            {"kind": item["kind"], "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
            for item in body["items"]
        ]
        answer = {
            "room": body["room"],
            "endpoint": "tcp://127.0.0.1:1",
            "items": items,
            "total_tokens": 16 * len(items),
        }
        return JSONResponse(answer)

    async def _generate(self, request: Request) -> Response:
        fake = await self._record(request, json.loads(await request.body()))
        if refused := await self._refused(fake, request):
            return refused
        return StreamingResponse(self._play(fake, request), media_type=LINES)

    async def _tokenize(self, request: Request) -> Response:
        """Has a token for each byte."""
        body = json.loads(await request.body())
        await self._record(request, body)
        tokens = list((body.get("prompt") or "hi").encode())
        return JSONResponse({"count": len(tokens), "tokens": tokens})

    async def _detokenize(self, request: Request) -> Response:
        body = json.loads(await request.body())
        await self._record(request, body)
        return JSONResponse({"prompt": bytes(body["tokens"]).decode()})

    async def _play(self, fake: FakeWorker, request: Request) -> AsyncIterator[bytes]:
        lines = line_writer(request.scope)
        for line in fake.scripts.pop(0) if fake.scripts else fake.script:
            if line == BREAK:
                raise ConnectionAbortedError("scripted")
            if line == HOLD:
                await self._held(fake, request)
            elif line == DAMAGE:
                yield lines.line(json.dumps(END).encode()).replace(b"stop", b"step")
            elif line == FORGE:
                yield LineWriter(request.headers[MESSAGE_DIGEST]).line(json.dumps(END).encode())
            else:
                yield lines.line(line.encode() if isinstance(line, str) else json.dumps(line).encode())

    async def _held(self, fake: FakeWorker, request: Request) -> None:
        fake.holding += 1
        try:
            while not self.release.is_set() and not await request.is_disconnected():
                await asyncio.sleep(0.005)
        finally:
            with self.changed:
                fake.holding -= 1
                fake.left += not self.release.is_set()
                self.changed.notify_all()


async def _started(app: Any, listener: socket.socket, lifespan: Literal["on", "off"]) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http="h11",
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,  # longer than clients keep connections, as that of real workers
        timeout_graceful_shutdown=2,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    return server


async def _stopped(server: uvicorn.Server) -> None:
    for listening in server.servers:
        listening.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    if server.server_state.tasks:
        _, late = await asyncio.wait(server.server_state.tasks, timeout=DEADLINE / 2)
        assert not late, "requests were still being answered"
    await server.lifespan.shutdown()


async def _broken() -> AsyncIterator[bytes]:
    yield b"{"
    raise ConnectionAbortedError("scripted")


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """Yields the URL of a port of this host that refuses connections while the context lasts."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, so that no other process gets it; not listening, so it refuses
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"
