"""One attempt at a request: its calls to two workers, encode, then generate; and their abort if anything fails."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import ExitStack
from typing import Any

import httpx
import msgspec

from embferry.discovery.leases import Role, Worker
from embferry.serve.errors import ServeError, from_body
from embferry.serve.http.backends import reason_of
from embferry.serve.off_loop import off_loop
from embferry.serve.router.fleet import Fleet

log = logging.getLogger(__name__)

ABORT_TIMEOUT = 2.0
"""Seconds that a worker may take to accept an abort. What it still holds after that is freed by its own time-outs."""
PIECE_BYTES = 64 << 10
"""Bytes of a body that a worker must take within ``router.stall_timeout``: a slow link is not a stalled worker."""
_NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LOST_EMBEDDING = frozenset({"peer_gone", "transport_error", "lease_expired"})
"""Codes with which a language worker reports that the embedding does not arrive."""


def draw_room() -> int:
    """Returns a ``bootstrap_room``: 63 random bits, so that two routers do not use the same one."""
    return secrets.randbits(63)


class WorkerLostError(ServeError):
    """A worker has failed before the end. Another one may succeed.

    Attributes:
        worker: the worker that has failed, as far as it is known.
    """

    def __init__(self, worker: Worker, cause: ServeError) -> None:
        super().__init__(
            cause.code, cause.detail, param=cause.param, status=cause.http_status, retryable=cause.retryable
        )
        self.worker = worker


class WorkerCall:
    """Used once: :meth:`encode` if there is media, then :meth:`events`; :meth:`close` in any case.

    Args:
        fleet: the workers.
        request_id: the request's.
        room: None for a request of text alone, which needs no transfer.
        avoid: ids of workers that are not asked.

    Attributes:
        workers: the workers that may hold something for this request.
    """

    def __init__(self, fleet: Fleet, request_id: str, room: int | None, avoid: Collection[str] = ()) -> None:
        self._fleet = fleet
        self._request_id = request_id
        self._avoid = avoid
        self.room = room
        self.workers: list[Worker] = []
        self._in_flight = ExitStack()
        self._encoded: dict[str, Any] = {"endpoint": None, "items": []}
        self._encoder: Worker | None = None
        self._ended = False
        self._gone: set[str] = set()  # ids of workers whose connection broke or could not be made

    async def encode(self, items: list[dict[str, Any]]) -> None:
        """Has the items encoded.

        Raises:
            ServeError: no_worker; any error of the encode worker.
        """
        request = {"room": self.room, "request_id": self._request_id, "items": items}
        body = await off_loop(nbytes_of(items), msgspec.msgpack.encode, request)
        self._encoder, response = await self._first("encode", "/encode", body, "application/msgpack", whole=True)
        try:
            answer = json.loads(response.content)
            described = answer["items"]
            if len(described) != len(items) or not isinstance(answer["endpoint"], str):
                raise ValueError
            self._encoded = {"endpoint": answer["endpoint"], "items": described}
        except (ValueError, KeyError, TypeError) as error:
            raise ServeError("worker_failed", "the encode worker's answer is malformed") from error

    async def events(
        self, messages: list[dict[str, Any]], nbytes: int, sampling: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yields the language worker's events: ``token`` for each token, then one ``end``.

        Raises:
            WorkerLostError: a worker has failed, so that this attempt cannot succeed.
            ServeError: no_worker; any error of the worker.
        """
        request = {"room": self.room, "request_id": self._request_id, "messages": messages, "sampling": sampling}
        body = await off_loop(nbytes, msgspec.json.encode, request | self._encoded)
        worker, response = await self._first("language", "/generate", body, "application/json")
        try:
            async for line in response.aiter_lines():
                event = _event(line)
                if event["type"] == "error":
                    raise self._reported(from_body(event, 502))
                if event["type"] == "ping":
                    continue
                self._ended = event["type"] == "end"
                yield event
                if self._ended:
                    return
        except httpx.TransportError as error:
            self._failed("language", worker, error)
            raise self._lost("language", worker, error) from error
        finally:
            await response.aclose()
        self._fleet.suspect(worker)
        why = "the language worker broke off before the end of the answer"
        raise WorkerLostError(worker, ServeError("worker_failed", why))

    async def _first(
        self, role: Role, path: str, body: bytes, content_type: str, *, whole: bool = False
    ) -> tuple[Worker, httpx.Response]:
        """Returns the first worker that accepts the request, and its response with status 200.

        A worker that cannot be reached or has no capacity is passed over: nothing has begun there. With ``whole`` the
        response's body is read too, and a worker that breaks off or stalls before its end is passed over as well.
        Without, the caller reads the response and closes it.
        """
        failed: list[str] = []
        full: ServeError | None = None
        router = self._fleet.settings.router
        timeout = httpx.Timeout(router.stall_timeout, connect=router.connect_timeout, pool=None)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), "X-Request-Id": self._request_id}
        for worker in await self._fleet.candidates(role, self._avoid):
            request = self._fleet.client.build_request(
                "POST", worker.url + path, content=_pieces(body), headers=headers, timeout=timeout
            )
            if worker not in self.workers:
                self.workers.append(worker)
                self._in_flight.enter_context(self._fleet.count_in_flight(worker.id))
            try:
                response = await self._fleet.client.send(request, stream=not whole)
            except httpx.TransportError as error:
                self._failed(role, worker, error)
                if not (whole or isinstance(error, _NOT_REACHED)):
                    raise self._lost(role, worker, error) from error
                failed.append(f"{worker.id} at {worker.url}: {self._reason(error)}")
                continue
            refusal = await _refusal(response, whole=whole)
            if refusal is None:
                return worker, response
            if refusal.http_status != 503:
                raise refusal
            full = refusal
        raise full or ServeError("no_worker", f"no {role} worker can be reached: {'; '.join(failed)}")

    def _failed(self, role: Role, worker: Worker, error: httpx.TransportError) -> None:
        self._fleet.suspect(worker)
        self._gone.add(worker.id)
        self._fleet.metrics.worker_failures.labels(role).inc()
        facts = {"worker": worker.id, "url": worker.url, "reason": self._reason(error)}
        log.warning("a worker failed", extra=facts)

    def _lost(self, role: Role, worker: Worker, error: httpx.TransportError) -> WorkerLostError:
        why = f"the {role} worker broke off: {self._reason(error)}"
        return WorkerLostError(worker, ServeError("worker_failed", why))

    def _reported(self, error: ServeError) -> ServeError:
        """Returns a language worker's error; it is the encode worker that is lost if its embedding does not arrive."""
        if self._encoder is None or error.code not in _LOST_EMBEDDING:
            return error
        self._fleet.suspect(self._encoder)
        return WorkerLostError(self._encoder, error)

    def _reason(self, error: httpx.TransportError) -> str:
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            seconds = self._fleet.settings.router.stall_timeout
            return f"it gave no sign of life for {seconds:g} seconds (router.stall_timeout)"
        return reason_of(error)

    async def close(self) -> None:
        """Releases the workers. Aborts the room there unless the answer came to its end. Never raises."""
        self._in_flight.close()
        if self._ended or self.room is None:
            return
        for worker in self.workers:
            try:
                await self._fleet.client.delete(f"{worker.url}/rooms/{self.room}", timeout=ABORT_TIMEOUT)
            except httpx.HTTPError as error:
                facts = {"worker": worker.id, "reason": reason_of(error)}
                is_gone = worker.id in self._gone or isinstance(error, _NOT_REACHED)
                level = logging.DEBUG if is_gone else logging.WARNING
                log.log(level, "a worker could not be told of an abort", extra=facts)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), PIECE_BYTES):
        yield body[at : at + PIECE_BYTES]


def nbytes_of(items: list[dict[str, Any]]) -> int:
    """Returns the bytes of the media in ``items``."""
    return sum(len(item["data"]) if "data" in item else sum(map(len, item["frames"])) for item in items)


async def _refusal(response: httpx.Response, *, whole: bool) -> ServeError | None:
    """Returns the error in a worker's response, or None if there is none.

    The status of an encode worker that has taken long is always 200, because it has been sent as a sign of life.
    """
    if response.status_code == 200:
        if not whole or b'"error"' not in response.content[:1000]:
            return None
        try:
            content = json.loads(response.content)
        except ValueError:
            return None
        return from_body(content, 502) if isinstance(content, dict) and "error" in content else None
    try:
        return from_body(json.loads(await response.aread()), response.status_code)
    except (ValueError, httpx.TransportError):
        return from_body(None, response.status_code)
    finally:
        await response.aclose()


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if event["type"] not in ("token", "end", "error", "ping"):
            raise ValueError
        if event["type"] == "token" and not (isinstance(event["text"], str) and isinstance(event["token_id"], int)):
            raise ValueError
        if event["type"] == "end" and not (
            isinstance(event["finish_reason"], str) and isinstance(event["usage"], dict)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ServeError("worker_failed", f"the language worker sent a malformed event: {line[:200]!r}") from error
    return dict(event)
