"""One attempt at a request: its calls to two workers, encode, then generate; and their abort if anything fails."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import ExitStack
from typing import Any, TypeVar

import httpx
import msgspec

from embferry.discovery.leases import Role, Worker
from embferry.protocol.errors import WrongKey
from embferry.serve.errors import ServeError, from_body
from embferry.serve.http.answers import read_json
from embferry.serve.http.backends import reason_of
from embferry.serve.http.calls import add_digests, checked_body, checked_lines, is_streamed
from embferry.serve.http.journal import current_record
from embferry.serve.http.request_trace import NO_CALL
from embferry.serve.off_loop import off_loop
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.worker_events import parse_event
from embferry.serve.shared_threads import current_client
from embferry.trust.bounded_answers import ANSWER_LIMIT, MAX_ANSWER_BYTES, MAX_COMPLETION_BYTES
from embferry.trust.digests import DamagedError, content_digest

T = TypeVar("T")
log = logging.getLogger(__name__)

ABORT_TIMEOUT = 2.0
"""Seconds that a worker may take to accept an abort. What it still holds after that is freed by its own time-outs."""
PIECE_BYTES = 64 << 10
"""Bytes of a body that a worker must take within ``router.stall_timeout``: a slow link is not a stalled worker."""
_NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_DAMAGED_REQUEST = frozenset({"body_damaged", "body_timeout"})
"""Codes with which a worker says that a request has not arrived as it was sent."""
_LOST_EMBEDDING = frozenset({"peer_gone", "transport_error", "lease_expired"})
"""Codes with which a language worker reports that the embedding does not arrive."""


def draw_room() -> int:
    """Returns a ``bootstrap_room``: 63 random bits, so that two routers do not use the same one."""
    return secrets.randbits(63)


class WorkerLostError(ServeError):
    """A worker has failed before the end. Another one may succeed.

    Attributes:
        worker: the worker that has failed, as far as it is known.
        damaged: a message to it or from it has arrived damaged, so the worker itself may well succeed.
    """

    def __init__(self, worker: Worker, cause: ServeError, *, damaged: bool = False) -> None:
        super().__init__(
            cause.code, cause.detail, param=cause.param, status=cause.http_status, retryable=cause.retryable
        )
        self.worker, self.damaged = worker, damaged


class WorkerCall:
    """Used once: :meth:`encode` if there is media, then :meth:`events`; :meth:`close` in any case.

    Args:
        fleet: the workers.
        request_id: the request's.
        room: None for a request of text alone, which needs no transfer.
        avoid: ids of workers that are not asked.
        prefer: id of a worker that is asked first.
        holder: id of the encode worker that may have the embedding of an earlier attempt; asked first unless it has
            failed lately.

    Attributes:
        workers: the workers that may hold something for this request.
    """

    def __init__(
        self,
        fleet: Fleet,
        request_id: str,
        room: int | None,
        avoid: Collection[str] = (),
        prefer: str | None = None,
        holder: str | None = None,
    ) -> None:
        self._fleet = fleet
        self._request_id = request_id
        self._avoid, self._prefer, self._holder = avoid, prefer, holder
        self.room = room
        self.workers: list[Worker] = []
        self._in_flight = ExitStack()
        self._encoded: dict[str, Any] = {"endpoint": None, "items": []}
        self._encoder: Worker | None = None
        self._ended = False
        self._gone: set[str] = set()  # ids of workers whose connection broke or could not be made
        self._call = NO_CALL

    async def encode(self, items: list[dict[str, Any]]) -> str:
        """Has the items encoded. Returns the id of the encode worker.

        Raises:
            WorkerLostError: a message was damaged, so that this attempt cannot succeed.
            ServeError: no_worker; any error of the encode worker.
        """
        current_record().phase("encode")
        request = {"room": self.room, "request_id": self._request_id, "items": items, "client": current_client()}
        body = await off_loop(nbytes_of(items), msgspec.msgpack.encode, request)
        self._encoder, content = await self._first("encode", "/encode", body, "application/msgpack", self._whole)
        self._call.end()
        try:
            answer = read_json(content)
            described = answer["items"]
            if len(described) != len(items) or not isinstance(answer["endpoint"], str):
                raise ValueError
            self._encoded = {"endpoint": answer["endpoint"], "items": described}
            return self._encoder.id
        except (ValueError, KeyError, TypeError) as error:
            raise ServeError("worker_failed", "the encode worker's answer is malformed") from error

    async def events(
        self, prompt: dict[str, Any], nbytes: int, sampling: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yields the language worker's events: ``token`` for each token, then one ``end``.

        Args:
            prompt: its fields, as ``messages``.
            nbytes: bytes of its texts, about.
            sampling: how the answer is generated.

        Raises:
            WorkerLostError: a worker has failed, so that this attempt cannot succeed.
            ServeError: no_worker; any error of the worker.
        """
        request = {"room": self.room, "request_id": self._request_id, **prompt, "sampling": sampling}
        request |= {"client": current_client(), "progress": True}
        body = await off_loop(nbytes, msgspec.json.encode, request | self._encoded)
        worker, response = await self._first("language", "/generate", body, "application/json", self._begun)
        with self._call:
            if self.room is None:
                current_record().phase("prefill")
            try:
                async for line in checked_lines(response):
                    event = parse_event(line)
                    if event["type"] == "error":
                        raise self._reported(worker, from_body(event, 502))
                    if event["type"] == "ping":
                        continue
                    if event["type"] == "progress":
                        self._progressed(event)
                        continue
                    self._ended = event["type"] == "end"
                    yield event
                    if self._ended:
                        return
            except httpx.TransportError as error:
                if _is_garbled(error):
                    raise self._damaged("language", worker, str(error)) from error
                self._failed("language", worker, error)
                raise self._lost("language", worker, error) from error
            except DamagedError as error:
                raise self._damaged("language", worker, str(error)) from error
            finally:
                await response.aclose()
            self._fleet.suspect(worker)
            why = "the language worker broke off before the end of the answer"
            raise WorkerLostError(worker, ServeError("worker_failed", why))

    def _progressed(self, event: dict[str, Any]) -> None:
        """Notes how much of the embedding a language worker has received."""
        record = current_record()
        record.arrives(event)
        if "seconds" in event:
            self._fleet.metrics.transfer_seconds.observe(event["seconds"])
            record.has_transferred(event["seconds"], event["ago"])

    async def ask_language(self, path: str, request: dict[str, Any], nbytes: int) -> Any:
        """Returns the answer of a language worker that comes at once, as a JSON value.

        Args:
            path: the worker's.
            request: its other fields.
            nbytes: of the request, about.

        Raises:
            WorkerLostError: a message was damaged.
            ServeError: no_worker; any error of the worker.
        """
        current_record().phase("answer")
        request = {**request, "request_id": self._request_id, "client": current_client()}
        body = await off_loop(nbytes, msgspec.json.encode, request)
        _, content = await self._first("language", path, body, "application/json", self._whole)
        self._call.end()
        try:
            return read_json(content)
        except ValueError as error:
            raise ServeError("worker_failed", "the language worker's answer is malformed") from error

    async def _first(
        self,
        role: Role,
        path: str,
        body: bytes,
        content_type: str,
        accept: Callable[[httpx.Response], Awaitable[T]],
    ) -> tuple[Worker, T]:
        """Returns the first worker that accepts the request, and what ``accept`` makes of its response.

        A worker that cannot be reached or has no capacity is passed over: nothing has begun there. An encode worker
        that breaks off or stalls before the end of its response is passed over as well.
        """
        failed: list[str] = []
        full: ServeError | None = None
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), "X-Request-Id": self._request_id}
        digest = await off_loop(len(body), content_digest, body)
        for worker in await self._fleet.candidates(role, self._avoid, self._prefer, self._holder):
            if worker not in self.workers:
                self.workers.append(worker)
                self._in_flight.enter_context(self._fleet.count_in_flight(worker.id))
            self._call = current_record().asks(role, worker.id)
            request = add_digests(self._request(role, worker.url + path, body, headers), digest)
            try:
                response = await self._fleet.client.send(request, stream=True, auth=self._fleet.proof_of(worker))
                return worker, await accept(response)
            except httpx.TransportError as error:
                self._call.end(type(error).__name__)
                if _is_garbled(error):
                    raise self._damaged(role, worker, str(error)) from error
                self._failed(role, worker, error)
                if not (role == "encode" or isinstance(error, _NOT_REACHED)):
                    raise self._lost(role, worker, error) from error
                failed.append(f"{worker.id} at {worker.url}: {self._reason(error)}")
            except DamagedError as error:
                self._call.end("network_damage")
                raise self._damaged(role, worker, str(error)) from error
            except ServeError as refusal:
                self._call.end(refusal.code)
                if refusal.code in _DAMAGED_REQUEST:
                    raise self._damaged(role, worker, refusal.detail) from refusal
                if refusal.http_status != 503:
                    raise
                if refusal.code == "worker_unfit":
                    self._fleet.suspect(worker)
                full = refusal
        why = f"no {role} worker can be reached ({'; '.join(failed)}); try again when one has started"
        raise full or ServeError("no_worker", why)

    def _request(self, role: Role, url: str, body: bytes, headers: dict[str, str]) -> httpx.Request:
        """Returns the request of the call that has begun."""
        router = self._fleet.settings.router
        return self._fleet.client.build_request(
            "POST",
            url,
            content=_Pieces(body),
            headers={**headers, **self._call.headers},
            timeout=httpx.Timeout(router.stall_timeout, connect=router.connect_timeout, pool=None),
            extensions={ANSWER_LIMIT: MAX_COMPLETION_BYTES if role == "language" else MAX_ANSWER_BYTES},
        )

    async def _whole(self, response: httpx.Response) -> bytes:
        """Returns the content of an encode worker's answer, whose last line has it if it took long.

        Raises:
            ServeError: it is an error. The status of an answer that took long is always 200.
        """
        try:
            if not is_streamed(response):
                return _unless_error(response.status_code, await checked_body(response))
            async for line in checked_lines(response):
                return _unless_error(200, line)
        finally:
            await response.aclose()
        raise httpx.ReadError("it broke off before its answer")

    async def _begun(self, response: httpx.Response) -> httpx.Response:
        """Returns the response of a language worker that has begun to answer. The caller reads and closes it.

        Raises:
            ServeError: it refuses.
        """
        if is_streamed(response):
            return response
        try:
            _unless_error(response.status_code, await checked_body(response))
        finally:
            await response.aclose()
        raise ServeError("worker_failed", "the language worker answered without events")

    def _failed(self, role: Role, worker: Worker, error: httpx.TransportError) -> None:
        self._fleet.suspect(worker)
        self._gone.add(worker.id)
        self._fleet.metrics.worker_failures.labels(role).inc()
        facts = {"worker": worker.id, "url": worker.url, "reason": self._reason(error)}
        log.warning("a worker failed", extra=facts)
        self._fleet.journal.event("worker_failed", worker=worker.id, role=role, reason=self._reason(error))

    def _lost(self, role: Role, worker: Worker, error: httpx.TransportError) -> WorkerLostError:
        why = f"the {role} worker broke off: {self._reason(error)}"
        return WorkerLostError(worker, ServeError("worker_failed", why))

    def _damaged(self, role: Role, worker: Worker, why: str) -> WorkerLostError:
        self._fleet.metrics.damaged.labels(role).inc()
        facts = {"worker": worker.id, "url": worker.url, "reason": why}
        log.warning("a message between router and worker arrived damaged", extra=facts)
        self._fleet.journal.event("damaged", worker=worker.id, role=role)
        what = f"what router and {role} worker sent each other arrived damaged: {why}"
        return WorkerLostError(worker, ServeError("network_damage", what), damaged=True)

    def _reported(self, worker: Worker, error: ServeError) -> ServeError:
        """Returns a language worker's error; it is the encode worker that is lost if its embedding does not arrive."""
        if error.code in _DAMAGED_REQUEST:
            return self._damaged("language", worker, error.detail)
        if error.code == "worker_ending":
            self._fleet.suspect(worker)
            return WorkerLostError(worker, error)
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
                await self._abort(worker)
            except httpx.HTTPError as error:
                facts = {"worker": worker.id, "reason": reason_of(error)}
                is_gone = worker.id in self._gone or isinstance(error, _NOT_REACHED)
                level = logging.DEBUG if is_gone else logging.WARNING
                log.log(level, "a worker could not be told of an abort", extra=facts)

    async def _abort(self, worker: Worker) -> None:
        """Tells a worker of an abort, once more if the request arrived damaged.

        Raises:
            httpx.HTTPError: it was not told.
        """
        client, url, auth = self._fleet.client, f"{worker.url}/rooms/{self.room}", self._fleet.proof_of(worker)
        for _ in range(2):
            request = client.build_request("DELETE", url, timeout=ABORT_TIMEOUT)
            response = await client.send(add_digests(request), auth=auth)
            if response.status_code == 204:
                return
        raise httpx.HTTPError(f"status {response.status_code}")


class _Pieces:
    """A body in pieces, which may be sent more than once: a worker may ask for another proof of the cluster key."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self._body), PIECE_BYTES):
            yield self._body[at : at + PIECE_BYTES]


def nbytes_of(items: list[dict[str, Any]]) -> int:
    """Returns the bytes of the media in ``items``."""
    return sum(len(item["data"]) if "data" in item else sum(map(len, item["frames"])) for item in items)


def _is_garbled(error: httpx.TransportError) -> bool:
    """Returns whether what has arrived is no answer, other than by its early end or a wrong key."""
    early = ("disconnected", "peer closed connection")  # httpcore's words, and h11's
    is_early = any(words in str(error) for words in early) or isinstance(error.__cause__, WrongKey)
    return isinstance(error, httpx.RemoteProtocolError) and not is_early


def _unless_error(status: int, content: bytes) -> bytes:
    """Returns the content of a worker's answer. Raises ServeError if it is an error."""
    if status == 200 and b'"error"' not in content[:1000]:
        return content
    try:
        answer = read_json(content)
    except ValueError:
        answer = None
    if status != 200 or (isinstance(answer, dict) and "error" in answer):
        raise from_body(answer, status if status != 200 else 502)
    return content
