"""Sends the requests of a workload to a chat endpoint at their times, and measures."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import msgspec

from .results import Sample
from .stream import Events, Stream, error_text
from .workload import Request

MAX_REASON = 300
QUESTION = {"type": "text", "text": "What is this?"}


class Endpoint(msgspec.Struct, frozen=True):
    """The address of a chat endpoint, and the common part of all requests."""

    url: str
    """Without ``/v1``."""
    model: str
    max_tokens: int = 32
    timeout_s: float = 120.0
    """For one request; a request that takes longer has failed."""
    concurrency: int = 0
    """Requests under way at once; 0 for any number. The clock of a request that waits for others has not started."""
    extra: dict[str, Any] = {}
    """Fields of the body beyond OpenAI's."""
    api_key: str = ""

    def body(self, urls: Sequence[str]) -> dict[str, Any]:
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, QUESTION]}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Measured(msgspec.Struct):
    samples: list[Sample]
    duration: float
    complete: bool


class Callbacks(msgspec.Struct, frozen=True):
    """Called on the event loop's thread; may not block."""

    began: Callable[[int, float], None] = lambda number, at: None
    """A request was sent: its number, and the seconds since the run began."""
    ended: Callable[[Sample], None] = lambda sample: None


def send_all(
    endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], callbacks: Callbacks
) -> Measured:
    """Sends all requests and returns when they have ended.

    Ctrl-C and SIGTERM cancel what is under way; the samples that had ended by then are returned.
    """
    return asyncio.run(_send_all(endpoint, requests, urls, callbacks))


async def _send_all(
    endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], callbacks: Callbacks
) -> Measured:
    samples: list[Sample] = []
    # Bodies are made ahead: making one takes longer than many a first token.
    bodies = [msgspec.json.encode(endpoint.body(each)) for each in urls]
    room = asyncio.Semaphore(endpoint.concurrency or len(requests))
    headers = {"Content-Type": "application/json"} | endpoint.headers
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False) as client:
        start = time.perf_counter()

        async def one(request: Request, body: bytes) -> None:
            await asyncio.sleep(start + request.at - time.perf_counter())
            async with room:
                callbacks.began(request.number, time.perf_counter() - start)
                sample = await _ask(client, endpoint, request, body, start)
            samples.append(sample)
            callbacks.ended(sample)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*each)) for each in zip(requests, bodies, strict=True)]
            with _cancelled_by_signals(tasks):
                await asyncio.wait(tasks)
        duration = time.perf_counter() - start
    samples.sort(key=lambda sample: sample.number)
    return Measured(samples, duration, len(samples) == len(requests))


@contextmanager
def _cancelled_by_signals(tasks: Sequence[asyncio.Task[None]]) -> Iterator[None]:
    def cancel() -> None:
        for task in tasks:
            task.cancel()

    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with suppress(RuntimeError, ValueError):  # signals arrive only in the main thread
        for number in before:
            loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        with suppress(RuntimeError, ValueError):
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


async def _ask(client: httpx.AsyncClient, endpoint: Endpoint, request: Request, body: bytes, start: float) -> Sample:
    began = time.perf_counter()
    events, stream, status, failed = Events(), Stream(), None, ""
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            address = f"{endpoint.url}/v1/chat/completions"
            async with client.stream("POST", address, content=body) as response:
                status = response.status_code
                if status != httpx.codes.OK:
                    failed = f"HTTP {status}: {_reason(await response.aread())}"
                else:
                    async for data in response.aiter_bytes():
                        for event in events.feed(data):
                            stream.take(time.perf_counter() - began, event)
    except TimeoutError:
        failed = f"no whole answer within {endpoint.timeout_s:g} s"
    except httpx.HTTPError as error:
        failed = f"{type(error).__name__}: {error}".rstrip(": ")
    failed = failed or stream.error
    return Sample(
        number=request.number,
        began=began - start,
        pictures=len(request.pictures),
        image_tokens=request.image_tokens,
        repeated=request.repeated,
        status=status,
        error=failed[:MAX_REASON],
        ttft=stream.ttft,
        itls=tuple(stream.itls),
        latency=time.perf_counter() - began if failed else stream.latency,
        output_tokens=stream.output_tokens,
        prompt_tokens=stream.prompt_tokens,
        tokens=tuple(stream.tokens),
        text=stream.text,
    )


def _reason(body: bytes) -> str:
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")
    return error_text(answer) if isinstance(answer, dict) else str(answer)


def first_model(url: str, api_key: str = "", timeout_s: float = 10.0) -> str:
    """Returns the first model that the endpoint lists.

    Raises:
        ValueError: it lists none, or does not answer.
    """
    headers = Endpoint(url, "", api_key=api_key).headers
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url}/v1/models lists no model ({error}); start the server, or name one: --model") from error
