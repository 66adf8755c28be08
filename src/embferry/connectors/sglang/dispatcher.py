"""Sends the parts of requests to encoders, and those of an encoder that is lost to another one."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import msgspec

from embferry.traces.spans import Span
from embferry.trust.bounded_answers import bounded_client

from .encoders import MAX_ANSWER, Encoder, EncoderError, RequestRefusedError
from .parts import SOURCE_CODE, EncoderInfo, PartId, Source, encode_source
from .request_trace import RequestTrace
from .settings import PluginSettings

log = logging.getLogger(__name__)

T = TypeVar("T")
PAUSE_S = 0.2
"""Time between two rounds of attempts at encoders that were lost, in seconds."""
KEEP_ALIVE_S = 2.0
"""Seconds for which an idle connection is used again: SGLang's encoder closes it after 5, even under a request."""
BAD_REQUEST, UNAVAILABLE = 400, 503
MAX_RID = 512
"""Longest id of a request, in characters: it is part of the names of the request's parts."""


class Part(msgspec.Struct, frozen=True):
    """One part of a request, and the encoder that SGLang has chosen for it.

    Attributes:
        kind: The kind of media, such as "IMAGE".
        assigned: Number of the encoder among the request's.
        body: The fields of SGLang's encode request that do not depend on the encoder.
    """

    kind: str
    assigned: int
    body: dict[str, Any]


class Failure(msgspec.Struct, frozen=True):
    """Why a request has failed: a text, and an HTTP status."""

    why: str
    status: int


Tell = Callable[[str, int], None]
"""Sends a text and a number to every scheduler, in SGLang's message of a failed dispatch. Any thread."""


class Dispatch:
    """The dispatch of one request. The dispatcher's event loop calls the methods, but :meth:`reached`.

    Args:
        rid: SGLang's id of the request.
        urls: The encoders.
        parts: The parts, in SGLang's order.
        tell: Sends a message to the schedulers.
        trace: The trace of the request, if it has spans.
    """

    def __init__(
        self, rid: str, urls: Sequence[str], parts: Sequence[Part], tell: Tell, trace: RequestTrace | None
    ) -> None:
        self.rid, self.name = rid, secrets.token_hex(16)
        self._urls, self._parts, self._tell, self._trace = urls, parts, tell, trace
        self._reached = asyncio.Event()
        self.task: asyncio.Task[Failure | None] | None = None

    def reached(self) -> None:
        """The schedulers know the request from now on, so that they can be told about its parts."""
        self._reached.set()

    async def run(self, encoders: Callable[[str], Encoder], failover_timeout: float) -> Failure | None:
        """Has every part encoded. Returns the first failure of a part, None if there is none."""
        tasks = [
            asyncio.create_task(self._part(index, part, encoders, failover_timeout))
            for index, part in enumerate(self._parts)
        ]
        try:
            for task in asyncio.as_completed(tasks):
                await task
        except RequestRefusedError as error:
            return Failure(str(error), error.status)
        except EncoderError as error:
            return Failure(str(error), error.status or UNAVAILABLE)
        finally:
            for other in tasks:
                other.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None

    async def _part(self, index: int, part: Part, encoders: Callable[[str], Encoder], failover_timeout: float) -> None:
        attempt, lost_since, answered = 0, 0.0, dict[str, EncoderError]()
        failed = EncoderError("there is no encoder")
        while True:
            for encoder in self._order(part, encoders):
                if encoder.url in answered:
                    continue
                try:
                    info = await encoder.info(part.kind)
                    attempt += 1  # only these are told: encoders that are gone may be asked any number of times
                    await self._at(encoder, info, PartId(self.rid, self.name, index, attempt - 1), part)
                    return
                except EncoderError as error:
                    failed = error
                    log.warning("request %s, part %d: %s", self.rid[:64], index, error)
                    if error.status is not None:  # it lives, and says no: once is enough
                        answered[encoder.url] = error
            lost_since = lost_since or time.monotonic()
            if len(answered) == len(self._urls) or time.monotonic() - lost_since > failover_timeout:
                raise failed
            await asyncio.sleep(PAUSE_S)

    async def _at(self, encoder: Encoder, info: EncoderInfo, part: PartId, work: Part) -> None:
        """Has a part encoded at one encoder, and says so to the schedulers meanwhile."""
        source = Source(part.name, part.index, part.attempt, encoder.url, info)
        telling = asyncio.create_task(self._tell_source(source))
        body = work.body | {
            "encoder_url": encoder.url,
            "num_parts": len(self._parts),
            "part_idx": part.index,
            "req_id": part.text,
            "modality": work.kind,
        }
        span, outcome = self._call_span(encoder.url, part.index), "aborted"
        try:
            await encoder.encode(body, info, {} if span is None else span.context.headers)
            await telling
            outcome = ""
        except RequestRefusedError:
            outcome = "refused"
            raise
        except EncoderError as error:
            outcome = "lost" if error.status is None else "failed"
            raise
        finally:
            telling.cancel()
            if span is not None:
                span.end(outcome)
            if outcome:
                encoder.abandon(part.text)

    def _call_span(self, url: str, index: int) -> Span | None:
        """Returns the span of a call to an encoder; None unless the request has spans."""
        if self._trace is None:
            return None
        span = self._trace.begin("encode", "client")
        span.set(worker=url, part=index)
        return span

    async def _tell_source(self, source: Source) -> None:
        await self._reached.wait()
        self._tell(encode_source(source), SOURCE_CODE)

    def _order(self, part: Part, encoders: Callable[[str], Encoder]) -> list[Encoder]:
        """Returns the encoders in the order in which they are asked: the assigned one first, those lost lately last."""
        count = len(self._urls)
        found = [encoders(self._urls[(part.assigned + n) % count]) for n in range(count)]
        return sorted(found, key=lambda encoder: encoder.is_last_choice)


class Dispatcher:
    """Dispatches the requests of a language server, on a thread of its own. Any thread may call the methods."""

    def __init__(self, settings: PluginSettings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="embferry-dispatch", daemon=True)
        self._encoders: dict[str, Encoder] = {}
        self._dispatches: dict[str, list[Dispatch]] = {}
        self._thread.start()
        self._client = self._call(self._new_client()).result()

    def dispatch(
        self,
        rid: str,
        urls: Sequence[str],
        parts: Sequence[Part],
        tell: Tell,
        reached: threading.Event,
        trace: RequestTrace | None = None,
    ) -> Failure | None:
        """Has the parts of a request encoded. Blocks until they have arrived, or the request has ended otherwise.

        Args:
            rid: SGLang's id of the request.
            urls: The encoders.
            parts: The parts.
            tell: Sends a message to the schedulers.
            reached: Set when the schedulers know the request.
            trace: The trace of the request, if it has spans.
        """
        if len(rid) > MAX_RID:
            reached.wait()
            return Failure(f"the id of a request with pictures has at most {MAX_RID} characters", BAD_REQUEST)
        dispatch = Dispatch(rid, urls, parts, tell, trace)
        outcome = self._call(self._dispatch(dispatch))
        reached.wait()
        self._loop.call_soon_threadsafe(dispatch.reached)
        return outcome.result()

    def cancel(self, rid: str) -> None:
        """Ends the dispatches of a request, and tells the encoders that its parts are not wanted."""
        self._loop.call_soon_threadsafe(self._cancel, rid)

    def is_alive(self, url: str) -> Future[bool]:
        """Returns whether the process of an encoder answers, however busy it is."""
        return self._call(self._is_alive(url))

    def close(self) -> None:
        """Ends every dispatch, and the thread."""
        self._call(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # On the loop

    async def _new_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)
        return bounded_client(limits=limits, max_bytes=MAX_ANSWER)

    async def _dispatch(self, dispatch: Dispatch) -> Failure | None:
        dispatch.task = asyncio.create_task(dispatch.run(self._encoder, self._settings.failover_timeout))
        self._dispatches.setdefault(dispatch.rid, []).append(dispatch)
        try:
            return await dispatch.task
        except asyncio.CancelledError:
            return None  # cancel() was called: the request needs no answer
        finally:
            others = self._dispatches[dispatch.rid]
            others.remove(dispatch)
            if not others:
                del self._dispatches[dispatch.rid]

    async def _is_alive(self, url: str) -> bool:
        return await self._encoder(url).is_alive()

    def _cancel(self, rid: str) -> None:
        for dispatch in self._dispatches.get(rid, []):
            if dispatch.task is not None:
                dispatch.task.cancel()

    def _encoder(self, url: str) -> Encoder:
        if url not in self._encoders:
            settings = self._settings
            self._encoders[url] = Encoder(url, self._client, settings.encoder_timeout, settings.encode_timeout)
        return self._encoders[url]

    async def _close(self) -> None:
        tasks = [dispatch.task for dispatches in self._dispatches.values() for dispatch in dispatches if dispatch.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for encoder in self._encoders.values():
            await encoder.close()
        await self._client.aclose()
