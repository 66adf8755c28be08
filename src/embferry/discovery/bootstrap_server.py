"""The bootstrap server: an HTTP server around a :class:`~embferry.discovery.leases.LeaseTable`.

=========================================  =====================================================================
``PUT /workers/{id}``                      register a worker, or renew its lease: ``{"lease_seconds": …}``
``DELETE /workers/{id}``                   unregister a worker
``GET /workers[?role=encode|language]``    ``{"workers": […], "complete": true}``; not complete: soon after a start or
                                           a standstill, when living workers may be missing
``PUT /route``                             SGLang's registration of a rank
``GET /route?engine_rank=&target_dp_group=``  ``{"rank_ip", "rank_port"}``; both -1: the engine's sizes
``GET /health``                            200
``GET /metrics``                           gauges and counters, in Prometheus's text format
=========================================  =====================================================================

With a cluster key, every request but those for ``/health`` and ``/metrics`` needs a proof of it
(:mod:`embferry.trust.requests`), and every answer to one has a proof.

One thread serves all of it (:mod:`~embferry.discovery.http_server`), with bounds that keep slow and hostile clients
from delaying renewals. Errors are ``{"error": {"code", "message"}}`` with a matching status.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Literal, Self, TypeVar, cast, get_args
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from embferry.protocol.errors import CapacityError, LocalProtocolError, TransportError
from embferry.transports.net.loop import Scope
from embferry.trust.digests import CONTENT_DIGEST
from embferry.trust.policy import is_loopback
from embferry.trust.proof_checker import WHY, ProofChecker
from embferry.trust.requests import BOOTSTRAP, SCHEME, Accepted, Refused
from embferry.trust.trust import Trust

from .bootstrap_client import Lease
from .http_server import BACKLOG, Answer, Head, HttpServer, RequestError
from .leases import LeaseTable, Rank, Role, Worker
from .server_limits import ServerLimits

log = logging.getLogger(__name__)

DEFAULT_LIMITS = ServerLimits()

T = TypeVar("T")

METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "embferry_bootstrap_workers": ("gauge", ("role",), "Workers with a live lease"),
    "embferry_bootstrap_connections": ("gauge", (), "Open connections"),
    "embferry_bootstrap_evicted_connections_total": ("counter", (), "Connections that had to make room for others"),
    "embferry_bootstrap_timed_out_requests_total": ("counter", (), "Connections closed because their time was over"),
    "embferry_process_unproved_requests_refused_total": (
        "counter",
        (),
        "Requests without a proof of the cluster key that were too many of their address",
    ),
}
"""Type, labels and help text of each metric that the server shows."""


class _Route(Rank, frozen=True, kw_only=True):
    role: Literal["Encode"]


class BootstrapServer:
    """Listens between :meth:`start` and :meth:`stop`; as a context manager it calls both.

    Args:
        host: The address to listen on, or a name that has one.
        port: The port; 0 for any free one, which :attr:`port` then holds.
        lease_seconds: How long a worker counts as present after its last renewal.
        max_workers: Most workers that are registered at once.
        trust: Whether requests need a proof of the cluster key, where it may listen, and its certificate. None: what
            the environment says.
        unproved_ranks: Whether ``/route`` is open to ranks of the origin's system, which can prove nothing, although
            there is a cluster key.
        limits: Bounds on what clients can hold.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        lease_seconds: float = 5.0,
        max_workers: int = 1024,
        trust: Trust | None = None,
        unproved_ranks: bool = False,
        limits: ServerLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = host
        self.port = port
        self._table = LeaseTable(lease_seconds, max_workers)
        self._clock = clock
        self._limits = limits
        self._trust = Trust.or_environment(trust)
        self._checker: ProofChecker | None = None
        self._open_paths = ("/health", "/metrics", *(("/route",) if unproved_ranks else ()))
        self._lock = threading.Lock()  # guards the table: `workers` may be called from any thread
        self._http: HttpServer | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._trust.scheme}://{host}:{self.port}"

    def start(self) -> None:
        """Binds and listens. Requests are served once it returns.

        Raises:
            TransportError: The address cannot be bound (not retryable).
            LocalProtocolError: Already started; or strangers could reach it, and there is no cluster key.
        """
        if self._http is not None:
            raise LocalProtocolError("the bootstrap server was started already")
        if self._trust.keys is not None:
            self._checker = ProofChecker(self._trust.keys, BOOTSTRAP, "the bootstrap server")
        try:
            sock = _listen(self.host, self.port)
        except (OSError, OverflowError, UnicodeError) as error:
            raise TransportError(
                f"the bootstrap server cannot listen on {self.host}:{self.port} ({_reason(error)}); "
                "is another one running there? choose another port, or 0 for a free one",
                retryable=False,
            ) from error
        try:
            self._trust.check_listening(sock.getsockname()[0], "the bootstrap server")
        except LocalProtocolError:
            sock.close()
            raise
        self.port = int(sock.getsockname()[1])
        try:
            is_exempt = is_loopback if self._trust.keys is None else lambda address: False
            self._http = HttpServer(
                sock, self._answer, self._limits, "bootstrap", self._guard, self._trust.tls, is_exempt
            )
        except OSError as error:
            sock.close()
            raise TransportError(f"the bootstrap server cannot start: {error}", retryable=False) from error
        self._http.loop.call(partial(self._tick, self._http.loop))
        log.info("bootstrap server listens on %s", self.url)

    def stop(self) -> None:
        """Closes every connection, ends the thread, closes every socket. Idempotent."""
        http, self._http = self._http, None
        if http is not None:
            http.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def workers(self, role: Role | None = None) -> tuple[Worker, ...]:
        """Returns the workers whose lease has not ended."""
        with self._lock:
            return self._table.workers(self._clock(), role)

    def _tick(self, loop: Scope) -> None:
        with self._lock:
            self._table.tick(self._clock())
        loop.later(self._table.lease_seconds / 4, partial(self._tick, loop))

    def _guard(self, head: Head) -> Accepted | None:
        authorization = head.headers.get("authorization", "")
        is_open = head.target.partition("?")[0] in self._open_paths and not authorization.startswith(SCHEME)
        if self._checker is None or is_open:
            return None
        digest = head.headers.get(CONTENT_DIGEST.lower())
        verdict = self._checker.check(head.method, head.target, authorization, digest, head.address)
        if isinstance(verdict, Refused):
            challenge = {"WWW-Authenticate": verdict.challenge}
            raise RequestError(verdict.reason, WHY[verdict.reason], HTTPStatus.UNAUTHORIZED, challenge)
        return verdict

    def _answer(self, method: str, target: str, body: bytes) -> Answer:
        try:
            url = urlsplit(target)
            query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        except ValueError as error:
            raise RequestError("invalid_path", str(error)) from error
        head, _, tail = url.path.removeprefix("/").partition("/")
        verbs = _VERBS.get((head, bool(tail)))
        if verbs is None:
            raise RequestError("unknown_path", f"there is nothing at {url.path[:200]}", HTTPStatus.NOT_FOUND)
        if method not in verbs:
            allowed = f"{url.path} supports {' and '.join(verbs)} only"
            raise RequestError("unknown_method", allowed, HTTPStatus.METHOD_NOT_ALLOWED)
        with self._lock:
            now = self._clock()
            self._table.tick(now)
            for worker in self._table.expire(now):
                log.warning("%s worker %s has not renewed its lease and is removed", worker.role, worker.id)
            return verbs[method](self, unquote(tail), query, body)

    def _health(self, _tail: str, _query: dict[str, str], _body: bytes) -> Answer:
        return Answer({"status": "ok"})

    def _metrics(self, _tail: str, _query: dict[str, str], _body: bytes) -> Answer:
        roles = Counter(worker.role for worker in self._table.workers(self._clock()))
        values: dict[str, dict[str, int]] = {
            "embferry_bootstrap_workers": {f'{{role="{role}"}}': roles[role] for role in get_args(Role)}
        }
        if self._http is not None:
            values |= {
                "embferry_bootstrap_connections": {"": self._http.connections},
                "embferry_bootstrap_evicted_connections_total": {"": self._http.evicted},
                "embferry_bootstrap_timed_out_requests_total": {"": self._http.timed_out},
                "embferry_process_unproved_requests_refused_total": {"": self._http.rates.refused},
            }
        lines: list[str] = []
        for name, samples in values.items():
            kind, _, about = METRICS[name]
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labels} {value}" for labels, value in samples.items()]
        return Answer("\n".join(lines) + "\n")

    def _put_worker(self, tail: str, _query: dict[str, str], body: bytes) -> Answer:
        worker = _decoded(body, Worker)
        if worker.id != tail:
            raise RequestError("invalid_worker", f"worker {worker.id} at the path of {tail}")
        try:
            new = self._table.put(worker, self._clock())
        except CapacityError as error:
            headers = {"Retry-After": str(math.ceil(self._table.lease_seconds))}
            content = {"error": {"code": error.code, "message": error.detail}}
            return Answer(content, HTTPStatus.SERVICE_UNAVAILABLE, headers)
        if new:
            log.info("%s worker %s registered at %s", worker.role, worker.id, worker.url or worker.endpoint)
        lease = Lease(lease_seconds=self._table.lease_seconds, new=new)
        return Answer(lease, HTTPStatus.CREATED if new else HTTPStatus.OK)

    def _delete_worker(self, tail: str, _query: dict[str, str], _body: bytes) -> Answer:
        if not self._table.remove(tail):
            raise RequestError("unknown_worker", f"no worker {tail!r} is registered", HTTPStatus.NOT_FOUND)
        log.info("worker %s unregistered", tail)
        return Answer({"removed": tail})

    def _get_workers(self, _tail: str, query: dict[str, str], _body: bytes) -> Answer:
        role = query.get("role")
        if role not in (None, *get_args(Role)):
            raise RequestError("invalid_query", f"role must be encode or language, not {role!r}")
        now = self._clock()
        workers = self._table.workers(now, cast("Role | None", role))
        return Answer({"workers": workers, "complete": self._table.is_complete(now)})

    def _put_route(self, _tail: str, _query: dict[str, str], body: bytes) -> Answer:
        route = _decoded(body, _Route)
        self._table.put_rank(route)
        log.info("encode rank %d registered at %s:%d", route.engine_rank, route.rank_ip, route.rank_port)
        return Answer({"status": "ok"})

    def _get_route(self, _tail: str, query: dict[str, str], _body: bytes) -> Answer:
        rank, group = _integer(query, "engine_rank"), _integer(query, "target_dp_group")
        now = self._clock()
        if rank == group == -1:
            shape = self._table.shape(now)
            if shape is not None:
                return Answer({"embedding_tp_size": shape[0], "embedding_dp_size": shape[1]})
        else:
            found = self._table.route(rank, group, now)
            if found is not None:
                return Answer({"rank_ip": found.rank_ip, "rank_port": found.rank_port})
        raise RequestError("unknown_rank", f"no encode rank {rank} of group {group} is known", HTTPStatus.NOT_FOUND)


# (first part of the path, whether more follows) -> method -> handler
_VERBS: dict[tuple[str, bool], dict[str, Callable[[BootstrapServer, str, dict[str, str], bytes], Answer]]] = {
    ("health", False): {"GET": BootstrapServer._health},
    ("metrics", False): {"GET": BootstrapServer._metrics},
    ("workers", False): {"GET": BootstrapServer._get_workers},
    ("workers", True): {"PUT": BootstrapServer._put_worker, "DELETE": BootstrapServer._delete_worker},
    ("route", False): {"GET": BootstrapServer._get_route, "PUT": BootstrapServer._put_route},
}


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("invalid_body", str(error)) from error


def _integer(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if len(text) > 9 or not text.removeprefix("-").isdecimal():
        raise RequestError("invalid_query", f"{name} must be an integer, not {text[:32]!r}")
    return int(text)


def _reason(error: Exception) -> str:
    """Returns why an address cannot be bound. The system's own words: Python adds the address to them."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the first address of ``host`` that this machine has."""
    if not 0 <= port < 65536:
        raise OverflowError("a port is 0 to 65535")
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, (address, _, *rest) in found[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_server((address, port, *rest), family=family, backlog=BACKLOG)
    family, _, _, _, (address, _, *rest) = found[-1]
    return socket.create_server((address, port, *rest), family=family, backlog=BACKLOG)
