"""The other end of :mod:`embferry.discovery.bootstrap_server`: what workers and routers ask of it."""

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
FIRST_RETRY_SECONDS = 0.5  # while no lease has said how long it is

T = TypeVar("T")


class Lease(Struct, frozen=True):
    lease_seconds: Annotated[float, Meta(gt=0, le=86400)]
    """Renew within so many seconds."""
    new: bool
    """Whether the server did not know the worker before: it has been restarted, or the lease had ended."""


class Shape(Struct, frozen=True):
    """How many ranks and data-parallel groups the encode engine has."""

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
    """Asks one bootstrap server. Thread-safe: every call has its own connection.

    Every call may raise :class:`TransportError` (the server cannot be reached: retryable), :class:`RemoteProtocolError`
    (it answered nonsense) and :class:`LocalProtocolError` (it says that our request is wrong).

    :param url: such as ``http://10.0.0.5:8998``.
    :param timeout_s: for connecting and for each wait for bytes.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise LocalProtocolError(f"the bootstrap server's URL {url!r} cannot be read: {error}") from error
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise LocalProtocolError(f"the bootstrap server's URL is like http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, port

    def register(self, worker: Worker) -> Lease:
        """Puts the worker on the list until the lease ends.

        :raises CapacityError: the list is full.
        """
        return self._decoded(self._ok("PUT", f"/workers/{quote(worker.id, safe='')}", worker), Lease)

    def renew(self, worker: Worker) -> Lease:
        """Begins the lease anew. The same call as :meth:`register`: a restarted server learns of the worker."""
        return self.register(worker)

    def remove(self, worker_id: str) -> bool:
        """Takes the worker off the list; answers whether it was on it."""
        status, body = self._call("DELETE", f"/workers/{quote(worker_id, safe='')}")
        if status not in (200, 404):
            self._refused(status, body)
        return status == 200

    def workers(self, role: Role | None = None) -> tuple[Worker, ...]:
        """Those whose leases have not ended."""
        query = "" if role is None else "?" + urlencode({"role": role})
        return self._decoded(self._ok("GET", "/workers" + query), _Workers).workers

    def register_rank(self, rank: Rank) -> None:
        """SGLang's registration of an encode rank; it knows no lease."""
        self._ok("PUT", "/route", {"role": "Encode"} | msgspec.structs.asdict(rank))

    def route(self, engine_rank: int, target_dp_group: int = 0) -> RankAddress:
        """Where rank ``engine_rank`` of data-parallel group ``target_dp_group`` is.

        :raises PeerGone: no such rank has registered.
        """
        return self._decoded(self._route(engine_rank, target_dp_group), RankAddress)

    def shape(self) -> Shape:
        """The encode engine's sizes.

        :raises PeerGone: none has registered.
        """
        return self._decoded(self._route(-1, -1), Shape)

    def healthy(self) -> bool:
        """Whether the server answers; for :class:`HealthWatch`. Raises nothing."""
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
            raise TransportError(f"the bootstrap server at {self.url} is out of reach ({error})") from error
        except http.client.HTTPException as error:
            raise RemoteProtocolError(f"what answers at {self.url} is not a bootstrap server: {error!r}") from error
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
                f"the bootstrap server at {self.url} answered what cannot be read: {error}"
            ) from error


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return repr(body[:200])


class LeaseKeeper:
    """A thread that keeps one worker on the list: renews at a third of the lease and says the load.

    It puts the worker back after an outage or a restart of the server. The worker goes on meanwhile; one warning is
    logged for each outage.

    :param load: requests in progress; called on the keeper's thread before each renewal.
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
        """Does not wait: the bootstrap server may be started later than the worker."""
        self._thread.start()

    def wait_registered(self, timeout_s: float) -> bool:
        """Whether the worker was on the list within ``timeout_s``."""
        return self._registered.wait(timeout_s)

    def stop(self) -> None:
        """Ends the thread and takes the worker off the list, if the server can be reached. Idempotent."""
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
            self._leave()

    def _renewed(self, lease: Lease) -> None:
        if lease.new:
            again = " again" if self._registered.is_set() else ""
            log.info("registered%s with the bootstrap server at %s", again, self._client.url)
        self._failing = False
        self._registered.set()

    def _missed(self, error: Exception) -> None:
        if not self._failing:
            log.warning("worker %s is not on the list, and goes on trying: %s", self._worker.id, error)
        self._failing = True

    def _leave(self) -> None:
        try:
            self._client.remove(self._worker.id)
        except (TransportError, RemoteProtocolError, LocalProtocolError) as error:
            log.info("could not sign off; the lease will end by itself: %s", error)


class HealthWatch:
    """Counts misses in a row; pure. SGLang's receivers give up on an encode side after two."""

    def __init__(self, max_misses: int = 2) -> None:
        if max_misses < 1:
            raise LocalProtocolError(f"at least one miss is needed to give up, not {max_misses}")
        self.max_misses = max_misses
        self.misses = 0

    def saw(self, healthy: bool) -> bool:
        """Takes one poll's outcome; answers whether the peer counts as gone now."""
        self.misses = 0 if healthy else self.misses + 1
        return self.gone

    @property
    def gone(self) -> bool:
        return self.misses >= self.max_misses
