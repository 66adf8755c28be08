"""The client of the bootstrap server, and the thread that keeps a worker's lease."""

from __future__ import annotations

import http.client
import logging
import threading
from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from msgspec import Meta, Struct

from embferry.protocol.errors import (
    CapacityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)

from .leases import Rank, Role, Worker, with_load

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 16 << 20
FIRST_RETRY_SECONDS = 0.5  # until a lease says how long it lasts

T = TypeVar("T")


class Lease(Struct, frozen=True):
    """The server's answer to a registration or a renewal."""

    lease_seconds: Annotated[float, Meta(gt=0, le=86400)]
    """Seconds within which to renew."""
    new: bool
    """Whether the server did not know the worker: it was restarted, or the lease had ended."""


class Shape(Struct, frozen=True):
    """Numbers of ranks and of data-parallel groups of the encode engine."""

    embedding_tp_size: int
    embedding_dp_size: int


class RankAddress(Struct, frozen=True):
    rank_ip: str
    rank_port: int


class _Workers(Struct, frozen=True):
    workers: tuple[Worker, ...]


class _Error(Struct, frozen=True):
    message: str


class _Refusal(Struct, frozen=True):
    error: _Error


class BootstrapClient:
    """Client of one bootstrap server. Thread-safe: every call has its own connection.

    Every call may raise :class:`TransportError` (the server cannot be reached: retryable), :class:`RemoteProtocolError`
    (the answer is malformed) and :class:`LocalProtocolError` (the server rejects the request).

    Args:
        url: Such as ``http://10.0.0.5:8998``.
        timeout_s: Seconds for connecting, and for each wait for bytes.

    Raises:
        LocalProtocolError: ``url`` is malformed.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise LocalProtocolError(f"the bootstrap server's URL {url!r} cannot be read: {error}") from error
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise LocalProtocolError(f"the bootstrap server's URL must look like http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, port

    def register(self, worker: Worker) -> Lease:
        """Registers the worker until its lease ends.

        Raises:
            CapacityError: The table is full.
        """
        return self._decoded(self._ok("PUT", f"/workers/{quote(worker.id, safe='')}", worker), Lease)

    def renew(self, worker: Worker) -> Lease:
        """Renews the lease. The same request as :meth:`register`, so that a restarted server learns of the worker."""
        return self.register(worker)

    def remove(self, worker_id: str) -> bool:
        """Unregisters the worker. Returns whether it was registered."""
        status, body = self._call("DELETE", f"/workers/{quote(worker_id, safe='')}")
        if status not in (200, 404):
            self._refused(status, body)
        return status == 200

    def workers(self, role: Role | None = None) -> tuple[Worker, ...]:
        """Returns the workers whose leases have not ended."""
        query = "" if role is None else "?" + urlencode({"role": role})
        return self._decoded(self._ok("GET", "/workers" + query), _Workers).workers

    def register_rank(self, rank: Rank) -> None:
        """Registers an encode rank in SGLang's way, without a lease."""
        self._ok("PUT", "/route", {"role": "Encode"} | msgspec.structs.asdict(rank))

    def route(self, engine_rank: int, target_dp_group: int = 0) -> RankAddress:
        """Returns the address of rank ``engine_rank`` of data-parallel group ``target_dp_group``.

        Raises:
            PeerGone: No such rank has registered.
        """
        return self._decoded(self._route(engine_rank, target_dp_group), RankAddress)

    def shape(self) -> Shape:
        """Returns the sizes of the encode engine.

        Raises:
            PeerGone: No rank has registered.
        """
        return self._decoded(self._route(-1, -1), Shape)

    def healthy(self) -> bool:
        """Returns whether the server answers. Raises nothing."""
        try:
            return self._call("GET", "/health")[0] == 200
        except (TransportError, RemoteProtocolError) as error:
            log.debug("%s", error)
            return False

    def _route(self, engine_rank: int, target_dp_group: int) -> bytes:
        query = urlencode({"engine_rank": engine_rank, "target_dp_group": target_dp_group})
        status, body = self._call("GET", "/route?" + query)
        if status == 404:
            raise PeerGone(f"{_message(body)}; start the encode worker, or ask again when it is ready")
        if status != 200:
            self._refused(status, body)
        return body

    def _ok(self, method: str, path: str, content: object = None) -> bytes:
        status, body = self._call(method, path, content)
        if status not in (200, 201):
            self._refused(status, body)
        return body

    def _call(self, method: str, path: str, content: object = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self.timeout_s)
        try:
            payload = None if content is None else msgspec.json.encode(content)
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES + 1)
        except OSError as error:
            raise TransportError(f"the bootstrap server at {self.url} cannot be reached ({error})") from error
        except http.client.HTTPException as error:
            raise RemoteProtocolError(f"the server at {self.url} is not a bootstrap server: {error!r}") from error
        finally:
            connection.close()
        if len(body) > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"the bootstrap server's answer is longer than {MAX_ANSWER_BYTES} bytes")
        return response.status, body

    def _refused(self, status: int, body: bytes) -> NoReturn:
        detail = f"the bootstrap server at {self.url} answered {status}: {_message(body)}"
        if status == 503:
            raise CapacityError(detail)
        if status >= 500:
            raise TransportError(detail)
        raise LocalProtocolError(detail)

    def _decoded(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(
                f"the answer of the bootstrap server at {self.url} is malformed: {error}"
            ) from error


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return repr(body[:200])


class LeaseKeeper:
    """A thread that keeps one worker registered: renews after a third of the lease and reports the load.

    Registers the worker again after an outage or a restart of the server. Logs one warning for each outage.

    Args:
        client: The client of the bootstrap server.
        worker: The worker to register.
        load: Returns the requests in progress. Called on the keeper's thread, without locks, before each renewal.
    """

    def __init__(self, client: BootstrapClient, worker: Worker, load: Callable[[], float] = lambda: 0.0) -> None:
        self._client = client
        self._worker = worker
        self._load = load
        self._stopping = threading.Event()
        self._registered = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"lease {worker.id}", daemon=True)

    def start(self) -> None:
        """Starts the thread. Does not wait: the bootstrap server may start after the worker."""
        self._thread.start()

    def wait_registered(self, timeout_s: float) -> bool:
        """Waits until the worker is registered. Returns False after ``timeout_s`` seconds."""
        return self._registered.wait(timeout_s)

    def stop(self) -> None:
        """Ends the thread and unregisters the worker, if the server can be reached. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause = FIRST_RETRY_SECONDS
        while not self._stopping.is_set():
            try:
                lease = self._client.renew(with_load(self._worker, self._load()))
            except (TransportError, CapacityError, RemoteProtocolError, LocalProtocolError) as error:
                self._missed(error)
            else:
                self._renewed(lease)
                pause = lease.lease_seconds / 3
            self._stopping.wait(pause)
        if self._registered.is_set():
            self._unregister()

    def _renewed(self, lease: Lease) -> None:
        if lease.new:
            again = " again" if self._registered.is_set() else ""
            log.info("registered%s with the bootstrap server at %s", again, self._client.url)
        self._failing = False
        self._registered.set()

    def _missed(self, error: Exception) -> None:
        if not self._failing:
            log.warning("worker %s is not registered and keeps trying: %s", self._worker.id, error)
        self._failing = True

    def _unregister(self) -> None:
        try:
            self._client.remove(self._worker.id)
        except (TransportError, RemoteProtocolError, LocalProtocolError) as error:
            log.info("cannot unregister; the lease will expire: %s", error)


class HealthWatch:
    """Counts missed health checks in a row; pure. SGLang's receivers give up on an encode side after two."""

    def __init__(self, max_misses: int = 2) -> None:
        if max_misses < 1:
            raise LocalProtocolError(f"max_misses must be at least 1, not {max_misses}")
        self.max_misses = max_misses
        self.misses = 0

    def saw(self, healthy: bool) -> bool:
        """Counts the result of one health check. Returns whether the peer counts as gone."""
        self.misses = 0 if healthy else self.misses + 1
        return self.gone

    @property
    def gone(self) -> bool:
        return self.misses >= self.max_misses
