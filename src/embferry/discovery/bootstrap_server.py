"""The bootstrap server: an HTTP server around a :class:`~embferry.discovery.leases.LeaseTable`.

=========================================  =====================================================================
``PUT /workers/{id}``                      register a worker, or renew its lease: ``{"lease_seconds": …}``
``DELETE /workers/{id}``                   unregister a worker
``GET /workers[?role=encode|language]``    ``{"workers": […]}``
``PUT /route``                             SGLang's registration of a rank
``GET /route?engine_rank=&target_dp_group=``  ``{"rank_ip", "rank_port"}``; both -1: the engine's sizes
``GET /health``                            200
=========================================  =====================================================================

It uses the standard library's server, because the core of the project installs light and a few small requests a second
are its whole load. Errors are ``{"error": {"code", "message"}}`` with a matching status.
"""

from __future__ import annotations

import logging
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self, TypeVar, cast, get_args
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from embferry.protocol.errors import CapacityError, LocalProtocolError, TransportError

from .bootstrap_client import Lease
from .leases import LeaseTable, Rank, Role, Worker

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
MAX_CONNECTIONS = 256
IDLE_SECONDS = 5.0  # a client that sends nothing for longer is disconnected
STOP_CHECK_SECONDS = 0.1

Answer = tuple[HTTPStatus, object]
T = TypeVar("T")


class _Route(Rank, frozen=True, kw_only=True):
    role: Literal["Encode"]


class _RequestError(Exception):
    def __init__(self, code: str, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class BootstrapServer:
    """Listens between :meth:`start` and :meth:`stop`; as a context manager it calls both.

    Args:
        host: The address to listen on.
        port: The port; 0 for any free one, which :attr:`port` then holds.
        lease_seconds: How long a worker counts as present after its last renewal.
        max_workers: Most workers that are registered at once.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        lease_seconds: float = 5.0,
        max_workers: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = host
        self.port = port
        self._table = LeaseTable(lease_seconds, max_workers)
        self._clock = clock
        self._lock = threading.Lock()  # every request has its own thread
        self._http: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Binds and listens. Requests are served once it returns.

        Raises:
            TransportError: The address cannot be bound (not retryable).
            LocalProtocolError: Already started.
        """
        if self._http is not None:
            raise LocalProtocolError("the bootstrap server was started already")
        try:
            self._http = _Server((self.host, self.port), self._answer)
        except (OSError, OverflowError) as error:
            raise TransportError(
                f"the bootstrap server cannot listen on {self.host}:{self.port} ({error}); "
                "is another one running there? choose another address, or port 0 for a free one",
                retryable=False,
            ) from error
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(STOP_CHECK_SECONDS,), name="bootstrap", daemon=True
        )
        self._thread.start()
        log.info("bootstrap server listens on %s", self.url)

    def stop(self) -> None:
        """Closes every connection, ends every thread, closes every socket. Idempotent."""
        http, thread = self._http, self._thread
        self._http = self._thread = None
        if http is None or thread is None:
            return
        http.shutdown()
        thread.join()
        http.close_connections()
        http.server_close()  # joins the requests' threads

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def workers(self, role: Role | None = None) -> tuple[Worker, ...]:
        """Returns the workers whose lease has not ended."""
        with self._lock:
            return self._table.workers(self._clock(), role)

    def _answer(self, method: str, target: str, body: bytes) -> Answer:
        try:
            url = urlsplit(target)
        except ValueError as error:
            raise _RequestError("invalid_path", str(error)) from error
        head, _, tail = url.path.removeprefix("/").partition("/")
        verbs = _VERBS.get((head, bool(tail)))
        if verbs is None:
            raise _RequestError("unknown_path", f"there is nothing at {url.path}", HTTPStatus.NOT_FOUND)
        if method not in verbs:
            allowed = f"{url.path} supports {' and '.join(verbs)} only"
            raise _RequestError("unknown_method", allowed, HTTPStatus.METHOD_NOT_ALLOWED)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self._lock:
            for worker in self._table.expire(self._clock()):
                log.warning("%s worker %s has not renewed its lease and is removed", worker.role, worker.id)
            return verbs[method](self, unquote(tail), query, body)

    def _health(self, _tail: str, _query: dict[str, str], _body: bytes) -> Answer:
        return HTTPStatus.OK, {"status": "ok"}

    def _put_worker(self, tail: str, _query: dict[str, str], body: bytes) -> Answer:
        worker = _decoded(body, Worker)
        if worker.id != tail:
            raise _RequestError("invalid_worker", f"worker {worker.id} at the path of {tail}")
        new = self._table.put(worker, self._clock())
        if new:
            log.info("%s worker %s registered at %s", worker.role, worker.id, worker.url or worker.endpoint)
        lease = Lease(lease_seconds=self._table.lease_seconds, new=new)
        return (HTTPStatus.CREATED if new else HTTPStatus.OK), lease

    def _delete_worker(self, tail: str, _query: dict[str, str], _body: bytes) -> Answer:
        if not self._table.remove(tail):
            raise _RequestError("unknown_worker", f"no worker {tail!r} is registered", HTTPStatus.NOT_FOUND)
        log.info("worker %s unregistered", tail)
        return HTTPStatus.OK, {"removed": tail}

    def _get_workers(self, _tail: str, query: dict[str, str], _body: bytes) -> Answer:
        role = query.get("role")
        if role not in (None, *get_args(Role)):
            raise _RequestError("invalid_query", f"role must be encode or language, not {role!r}")
        return HTTPStatus.OK, {"workers": self._table.workers(self._clock(), cast("Role | None", role))}

    def _put_route(self, _tail: str, _query: dict[str, str], body: bytes) -> Answer:
        route = _decoded(body, _Route)
        self._table.put_rank(route)
        log.info("encode rank %d registered at %s:%d", route.engine_rank, route.rank_ip, route.rank_port)
        return HTTPStatus.OK, {"status": "ok"}

    def _get_route(self, _tail: str, query: dict[str, str], _body: bytes) -> Answer:
        rank, group = _integer(query, "engine_rank"), _integer(query, "target_dp_group")
        now = self._clock()
        if rank == group == -1:
            shape = self._table.shape(now)
            if shape is not None:
                return HTTPStatus.OK, {"embedding_tp_size": shape[0], "embedding_dp_size": shape[1]}
        else:
            found = self._table.route(rank, group, now)
            if found is not None:
                return HTTPStatus.OK, {"rank_ip": found.rank_ip, "rank_port": found.rank_port}
        raise _RequestError("unknown_rank", f"no encode rank {rank} of group {group} is known", HTTPStatus.NOT_FOUND)


def run(host: str, port: int, lease_seconds: float) -> None:
    """Serves until SIGTERM. Ctrl-C raises ``KeyboardInterrupt``. Call it on the main thread.

    Raises:
        TransportError: The address cannot be bound.
    """
    terminated = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        with BootstrapServer(host, port, lease_seconds=lease_seconds):
            terminated.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


# (first part of the path, whether more follows) -> method -> handler
_VERBS: dict[tuple[str, bool], dict[str, Callable[[BootstrapServer, str, dict[str, str], bytes], Answer]]] = {
    ("health", False): {"GET": BootstrapServer._health},
    ("workers", False): {"GET": BootstrapServer._get_workers},
    ("workers", True): {"PUT": BootstrapServer._put_worker, "DELETE": BootstrapServer._delete_worker},
    ("route", False): {"GET": BootstrapServer._get_route, "PUT": BootstrapServer._put_route},
}


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _RequestError("invalid_body", str(error)) from error


def _integer(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if len(text) > 9 or not text.removeprefix("-").isdecimal():
        raise _RequestError("invalid_query", f"{name} must be an integer, not {text[:32]!r}")
    return int(text)


class _Server(ThreadingHTTPServer):
    """Tracks its open connections, to close them at the end and to bound their number."""

    daemon_threads = False  # server_close() joins them
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], answer: Callable[[str, str, bytes], Answer]) -> None:
        self.answer = answer
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # not HTTPServer's, which resolves the host name by DNS
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open.add(request)
        if full:
            log.warning("rejected a connection: %d are open", MAX_CONNECTIONS)
            super().shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        with self._guard:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    log.debug("a connection had ended already")

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # the client has left, or its connection was closed
            log.debug("connection of %s broke: %s", client_address, error)
        else:
            log.error("a request of %s failed; report this as a bug", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = IDLE_SECONDS
    default_request_version = "HTTP/1.0"  # not 0.9, whose answers have no status line
    server_version = "embferry-bootstrap"
    sys_version = ""

    def _serve(self) -> None:
        try:
            status, content = self.server.answer(self.command, self.path, self._body())
        except _RequestError as refused:
            self._refuse(refused.status, refused.code, str(refused))
        except CapacityError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.code, error.detail)
        else:
            self._send(status, content)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _serve

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            raise _RequestError("length_required", "a body needs a Content-Length", HTTPStatus.LENGTH_REQUIRED)
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            raise _RequestError("too_large", f"at most {MAX_BODY_BYTES} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("the body ended early")
        return body

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": {"code": code, "message": message}})

    def _send(self, status: int, content: object) -> None:
        body = msgspec.json.encode(content)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the base class for a request that it cannot parse."""
        self._refuse(code, "invalid_request", message or explain or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
