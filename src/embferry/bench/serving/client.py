"""Sends the requests of a workload to a chat endpoint at their times, and measures."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec

from . import counters
from .results import Run, Sample
from .stream import Events, Stream, error_text
from .workload import Request, url

MAX_REASON = 300
MAX_ANSWER_BYTES = 64 << 20
"""Bytes of the longest answer; a server that sends more does not end it."""
DATA_URL = re.compile(r"data:[\w/.+-]*;base64,[\w+/=]*(?:,[\w+/=]+)*")
"""A picture, which errors may name."""
QUESTION = "What is this?"


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
    question: str = QUESTION
    """The text of every request."""

    def body(self, request: Request) -> bytes:
        kinds = [(picture, "video_url" if picture.frames else "image_url") for picture in request.pictures]
        pictures = [{"type": kind, kind: {"url": url(picture)}} for picture, kind in kinds]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": self.question}]}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(body | self.extra | ({"rid": request.rid} if request.rid else {}))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def send_all(
    endpoint: Endpoint,
    requests: Sequence[Request],
    run: Run,
    ended: Callable[[Sample], None] = lambda sample: None,
    began: Callable[[int, float], None] = lambda number, at: None,
    metrics: Sequence[str] = (),
) -> None:
    """Sends all requests and returns when they have ended.

    Args:
        endpoint: where to.
        requests: in the order of their times.
        run: gets the samples.
        ended: called when a request has ended. Both run on the event loop's thread and may not block.
        began: called when a request was sent, with its number and the seconds since the run began.
        metrics: URLs of counters; the run gets how much they rose.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run has the samples that had ended by then, and is not complete.
    """
    run.samples, run.complete, run.max_tokens, run.concurrency = [], False, endpoint.max_tokens, endpoint.concurrency
    # Bodies are made ahead: making one takes longer than many a first token.
    bodies = [endpoint.body(request) for request in requests]
    headers = {"Content-Type": "application/json"} | endpoint.headers
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def send() -> None:
        room = asyncio.Semaphore(endpoint.concurrency or len(requests))
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False) as client:
            start = time.perf_counter()

            async def one(request: Request, body: bytes) -> None:
                await asyncio.sleep(start + request.at - time.perf_counter())
                async with room:
                    began(request.number, time.perf_counter() - start)
                    sample = await _ask(client, endpoint, request, body, start)
                run.samples.append(sample)
                ended(sample)

            try:
                async with asyncio.TaskGroup() as group:
                    for each in zip(requests, bodies, strict=True):
                        group.create_task(one(*each))
            finally:
                run.duration = time.perf_counter() - start

    before = counters.read(metrics)
    try:
        asyncio.run(send())
        run.complete = True
    finally:
        run.samples.sort(key=lambda sample: sample.number)
        run.counters = counters.between(before, counters.read(metrics)) if metrics else {}


async def _ask(client: httpx.AsyncClient, endpoint: Endpoint, request: Request, body: bytes, start: float) -> Sample:
    began = time.perf_counter()
    events, stream, status, failed = Events(), Stream(), None, ""
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            address = f"{endpoint.url}/v1/chat/completions"
            async with client.stream("POST", address, content=body) as response:
                status = response.status_code
                is_right, size, refusal = status == httpx.codes.OK, 0, bytearray()
                async for data in response.aiter_bytes():
                    if (size := size + len(data)) > MAX_ANSWER_BYTES:
                        failed = f"more than {MAX_ANSWER_BYTES:,} bytes of an answer"
                        break
                    refusal += b"" if is_right else data
                    for event in events.feed(data) if is_right else ():
                        stream.take(time.perf_counter() - began, event)
                if not is_right and not failed:
                    failed = f"HTTP {status}: {_reason(bytes(refusal))}"
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
        error=DATA_URL.sub("data:…", failed)[:MAX_REASON],
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
    except (msgspec.DecodeError, RecursionError):
        return body.decode(errors="replace")
    return error_text(answer) if isinstance(answer, dict) else str(answer)
