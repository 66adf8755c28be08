"""Sends the requests of a workload at their times to a chat endpoint, and measures."""

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
from .stream import Events, Stream, said
from .workload import Request

MAX_REASON = 300
QUESTION = {"type": "text", "text": "What is this?"}


class Endpoint(msgspec.Struct, frozen=True):
    """Where requests go, and what they all have."""

    url: str
    """Up to, but without, ``/v1``."""
    model: str
    max_tokens: int = 32
    timeout_s: float = 120.0
    """For one request; one that takes longer has failed."""
    concurrency: int = 0
    """Requests under way at once; 0: any number. Who has to wait for others waits before its clock starts."""
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


class Measured(msgspec.Struct):
    samples: list[Sample]
    duration: float
    complete: bool


class Watch(msgspec.Struct, frozen=True):
    """Whom to tell while it runs; neither may wait."""

    began: Callable[[int, float], None] = lambda number, at: None
    """A request was sent: its number, and the seconds since the run began."""
    ended: Callable[[Sample], None] = lambda sample: None


def drive(endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], watch: Watch) -> Measured:
    """Until all have ended. Ctrl-C, or SIGTERM, ends it at once with what has ended by then."""
    return asyncio.run(_drive(endpoint, requests, urls, watch))


async def _drive(endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], watch: Watch) -> Measured:
    samples: list[Sample] = []
    # Each body is made ahead: to make one takes longer than many a first token.
    bodies = [msgspec.json.encode(endpoint.body(each)) for each in urls]
    room = asyncio.Semaphore(endpoint.concurrency or len(requests))
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False) as client:
        start = time.perf_counter()

        async def one(request: Request, body: bytes) -> None:
            await asyncio.sleep(start + request.at - time.perf_counter())
            async with room:
                watch.began(request.number, time.perf_counter() - start)
                sample = await _ask(client, endpoint, request, body, start)
            samples.append(sample)
            watch.ended(sample)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*each)) for each in zip(requests, bodies, strict=True)]
            with _interrupted_by(tasks):
                await asyncio.wait(tasks)
        duration = time.perf_counter() - start
    samples.sort(key=lambda sample: sample.number)
    return Measured(samples, duration, len(samples) == len(requests))


@contextmanager
def _interrupted_by(tasks: Sequence[asyncio.Task[None]]) -> Iterator[None]:
    """Signals cancel the tasks instead of what they would do."""

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    with suppress(RuntimeError, ValueError):  # not in the main thread, where signals do not arrive
        for number in signals:
            loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        with suppress(RuntimeError, ValueError):
            for number in signals:
                loop.remove_signal_handler(number)


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
    return said(answer) if isinstance(answer, dict) else str(answer)


def first_model(url: str, api_key: str = "", timeout_s: float = 10.0) -> str:
    """The first model that the endpoint names.

    :raises ValueError: there is none, or nobody answers."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url}/v1/models names no model ({error}); start the server, or name one: --model") from error
