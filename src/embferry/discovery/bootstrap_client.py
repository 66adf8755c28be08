"""The client of the bootstrap server, and the threads that keep a worker or a rank registered there."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import h11
import msgspec
from msgspec import Meta, Struct

from embferry.protocol.errors import (
    CapacityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TlsFailed,
    TransportError,
)
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content, content_digest
from embferry.trust.proved_call import GREETING_PATH, proved_call
from embferry.trust.requests import BOOTSTRAP, Prover
from embferry.trust.trust import Trust

from .http_client import MAX_ANSWER_BYTES, Response, exchange
from .leases import Rank, Role, Worker, WorkerList

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5  # at most, after a failure; a shorter lease is renewed sooner
RANK_RETRY_SECONDS = 0.2
STOP_SECONDS = 2.0
_NO_RANK = (404, 500)
"""Statuses of an answer about a rank that has not registered. 500 is that of SGLang's server."""

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


class BootstrapClient:
    """Client of one bootstrap server. Thread-safe: every call has its own connection.

    Every call may raise :class:`TransportError` (the server cannot be reached: retryable), :class:`RemoteProtocolError`
    (the answer is malformed) and :class:`LocalProtocolError` (the server rejects the request). Those with a proof may
    raise :class:`WrongKey` (the server has another cluster key, or one of both has none), and all of them
    :class:`TlsFailed` (the two ends cannot agree on TLS).

    Args:
        url: Such as ``http://10.0.0.5:8998``, or ``https://…`` for TLS.
        trust: What this end knows of the cluster key, and its certificate. None: what the environment says.
        must_prove: Whether a server without a cluster key is refused if this end has one. The origin's have none.
        timeout_s: Seconds for a whole call, from connecting to the last byte of the answer. Only the system's lookup
            of a host name may take longer.

    Raises:
        LocalProtocolError: ``url`` is malformed, or does not fit to what ``trust`` says about TLS.
    """

    def __init__(
        self, url: str, *, trust: Trust | None = None, must_prove: bool = True, timeout_s: float = 2.0
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise LocalProtocolError(f"the bootstrap server's URL {url!r} cannot be read: {error}") from error
        is_plain = url.isascii() and parts.path in ("", "/")
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise LocalProtocolError(f"the bootstrap server's URL must look like http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, port
        self._authority = parts.netloc.rpartition("@")[2]
        trust = Trust.or_environment(trust)
        trust.check_url(url, "the bootstrap server's URL")
        self._tls = trust.tls if parts.scheme == "https" else None
        keys = trust.keys
        self._prover = None if keys is None else Prover(keys.current, BOOTSTRAP)
        self._must_prove = must_prove
        self._dropped: set[str] = set()  # leases that have been reported

    def register(self, worker: Worker) -> Lease:
        """Registers the worker, or renews its lease; raises :class:`CapacityError` if the table is full."""
        return self._decoded(self._ok("PUT", f"/workers/{quote(worker.id, safe='')}", worker), Lease)

    def remove(self, worker_id: str) -> bool:
        """Unregisters the worker. Returns whether it was registered."""
        status, body = self._call("DELETE", f"/workers/{quote(worker_id, safe='')}")
        if status not in (200, 404):
            self._refused(status, body)
        return status == 200

    def workers(self, role: Role | None = None) -> tuple[Worker, ...]:
        """Returns the workers whose leases have not ended. Leaves out leases that are not valid."""
        query = "" if role is None else "?" + urlencode({"role": role})
        found, dropped = self._decoded(self._ok("GET", "/workers" + query), WorkerList).read()
        for lease in dropped.keys() - self._dropped:
            log.warning("the bootstrap server at %s lists a lease that is left out: %s", self.url, dropped[lease])
        self._dropped = set(dropped)
        return found

    def register_rank(self, rank: Rank) -> None:
        """Registers an encode rank in SGLang's way, without a lease."""
        self._ok("PUT", "/route", {"role": "Encode"} | msgspec.structs.asdict(rank))

    def route(self, engine_rank: int, target_dp_group: int = 0) -> RankAddress:
        """Returns the address of a rank of a data-parallel group; raises :class:`PeerGone` if it has not registered."""
        return self._decoded(self._route(engine_rank, target_dp_group), RankAddress)

    def shape(self) -> Shape:
        """Returns the sizes of the encode engine; raises :class:`PeerGone` if no rank has registered."""
        return self._decoded(self._route(-1, -1), Shape)

    def healthy(self) -> bool:
        """Returns whether the server answers. Raises nothing."""
        try:
            return self._send("GET", "/health", {}, b"", time.monotonic() + self.timeout_s).status == 200
        except (TransportError, RemoteProtocolError) as error:
            log.debug("%s", error)
            return False

    def _route(self, engine_rank: int, target_dp_group: int) -> bytes:
        query = urlencode({"engine_rank": engine_rank, "target_dp_group": target_dp_group})
        status, body = self._call("GET", "/route?" + query)
        if status in _NO_RANK or (status == 200 and _is_empty(body)):
            why = "the encode rank has not registered yet" if status == 200 else _message(body)
            raise PeerGone(f"{why}; start the encode worker, or ask again when it is ready")
        return body if status == 200 else self._refused(status, body)

    def _ok(self, method: str, path: str, content: object = None) -> bytes:
        status, body = self._call(method, path, content)
        return body if status in (200, 201) else self._refused(status, body)

    def _call(self, method: str, path: str, content: object = None) -> tuple[int, bytes]:
        """Sends a request, with a proof of the cluster key if there is one. Returns status and body of its answer."""
        deadline = time.monotonic() + self.timeout_s
        payload = b"" if content is None else msgspec.json.encode(content)
        digest = content_digest(payload) if payload else None
        headers = {"Content-Type": "application/json", CONTENT_DIGEST: digest} if digest else {}
        call = proved_call(
            self._prover, method, path, digest, f"the bootstrap server at {self.url}", must_prove=self._must_prove
        )
        attempt = next(call)
        while True:
            if attempt.is_greeting:
                response = self._send("GET", GREETING_PATH, {}, b"", deadline, attempt.authorization)
            else:
                response = self._send(method, path, headers, payload, deadline, attempt.authorization)
            try:
                attempt = call.send((response.status, response.headers.get))
            except StopIteration:
                return response.status, self._body(response)

    def _body(self, response: Response) -> bytes:
        digest = response.headers.get(CONTENT_DIGEST.lower())
        try:
            if digest is not None:  # a proof covers whether there is one
                check_content(digest, response.body)
        except DamagedError as error:
            raise TransportError(f"the answer of the bootstrap server at {self.url} is damaged: {error}") from error
        return bytes(response.body)

    def _send(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        payload: bytes,
        deadline: float,
        authorization: str | None = None,
    ) -> Response:
        own = {"Host": self._authority, "Content-Length": str(len(payload)), "Connection": "close"}
        proof = {} if authorization is None else {"Authorization": authorization}
        request = h11.Request(method=method, target=path, headers=list((own | headers | proof).items()))
        try:
            context = None if self._tls is None else self._tls.dialling()
            response = exchange(self._host, self._port, request, payload, deadline, context)
        except TlsFailed as error:
            raise TlsFailed(f"the bootstrap server at {self.url}: {error.detail}") from error
        except (OSError, UnicodeError) as error:  # the latter: of the codec for international names
            raise TransportError(f"the bootstrap server at {self.url} cannot be reached ({error})") from error
        except h11.RemoteProtocolError as error:
            raise RemoteProtocolError(f"the server at {self.url} is not a bootstrap server: {error}") from error
        if len(response.body) > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"the bootstrap server's answer is longer than {MAX_ANSWER_BYTES} bytes")
        return response

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


def _is_empty(body: bytes) -> bool:
    """Returns whether an answer has nulls: SGLang's server starts before the model is loaded, and knows no rank yet."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return answer is None or (isinstance(answer, dict) and None in answer.values())


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return repr(body[:200])


class _Keeper(ABC):
    """A thread that registers with the bootstrap server again and again, also after an outage or a restart of it.

    Logs one warning for each outage.
    """

    def __init__(self, thread_name: str, subject: str, retry_s: float) -> None:
        self._subject, self._retry_s = subject, retry_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)

    def start(self) -> None:
        """Starts the thread. Does not wait: the bootstrap server may be started later."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Idempotent.

        Waits for :data:`STOP_SECONDS` at most. A call that takes longer ends by its own time-out, on the thread.
        """
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                log.warning("the bootstrap server does not answer; %s leaves without it", self._subject)

    @abstractmethod
    def _register(self) -> float:
        """Registers once. Returns after how many seconds to register again."""

    def _run(self) -> None:
        failing = False
        while not self._stopping.is_set():
            try:
                pause = self._register()
            except (TransportError, CapacityError, RemoteProtocolError, LocalProtocolError) as error:
                if not failing:
                    log.warning("%s is not registered and keeps trying: %s", self._subject, error)
                failing, pause = True, self._retry_s
            except Exception:  # of the function that returns the load, say: a worker must not be lost by it
                log.exception("%s could not be registered; this is tried again", self._subject)
                failing, pause = True, self._retry_s
            else:
                failing = False
            self._stopping.wait(pause)


class LeaseKeeper(_Keeper):
    """A thread that keeps one worker registered: renews after a third of the lease and reports the load.

    Args:
        client: The client of the bootstrap server.
        worker: The worker to register.
        load: Returns the requests in progress. Called on the keeper's thread, without locks, before each renewal.
    """

    def __init__(self, client: BootstrapClient, worker: Worker, load: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__(f"lease {worker.id}", f"worker {worker.id}", RETRY_SECONDS)
        self._client = client
        self._worker = worker
        self._load = load
        self._registered = threading.Event()

    def wait_registered(self, timeout_s: float) -> bool:
        """Waits until the worker is registered. Returns False after ``timeout_s`` seconds."""
        return self._registered.wait(timeout_s)

    def _register(self) -> float:
        lease = self._client.register(msgspec.structs.replace(self._worker, load=self._load()))
        if lease.new:
            again = " again" if self._registered.is_set() else ""
            log.info("registered%s with the bootstrap server at %s", again, self._client.url)
        self._registered.set()
        pause = lease.lease_seconds / 3
        self._retry_s = min(RETRY_SECONDS, pause)
        return pause

    def _run(self) -> None:
        super()._run()
        if self._registered.is_set():
            try:
                self._client.remove(self._worker.id)
            except (TransportError, RemoteProtocolError, LocalProtocolError) as error:
                log.info("cannot unregister; the lease will expire: %s", error)


class RankKeeper(_Keeper):
    """A thread that keeps an encode rank registered in SGLang's way, every ``interval_s`` seconds.

    The origin's bootstrap server forgets its ranks on a restart.
    """

    def __init__(self, client: BootstrapClient, rank: Rank, interval_s: float) -> None:
        super().__init__("embferry-origin route", f"encode rank {rank.engine_rank}", RANK_RETRY_SECONDS)
        self._client, self._rank, self._interval_s = client, rank, interval_s

    def _register(self) -> float:
        self._client.register_rank(self._rank)
        return self._interval_s
