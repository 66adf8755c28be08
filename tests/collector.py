"""A collector for OTLP over HTTP, which tests look into, and which may misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.ports import free_port

DEADLINE = 60.0
"""Seconds after which spans that do not come fail a test."""


@dataclass(frozen=True)
class Seen:
    """A span that has arrived. Ids are hexadecimal; attributes have no prefix."""

    name: str
    service: str
    kind: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    error: str
    state: str


class Collector:
    """A running collector.

    Attributes:
        status: of its answers.
        hold: cleared, requests get no answer until it is set.
        endless: the bodies of answers have no end.
        requests: the number of those that have come.
        paths: those of the requests.
    """

    def __init__(self) -> None:
        self.status, self.endless = 200, False
        self.hold, self.closing = threading.Event(), threading.Event()
        self.hold.set()
        self.requests = 0
        self.paths: set[str] = set()
        self.sent_bytes = 0
        self.bodies: list[bytes] = []
        self._spans: list[Seen] = []
        self._changed = threading.Condition()
        self._server = self._listen(free_port())  # nothing else gets the port while it is down
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.closing.set()
        self.hold.set()
        self._stop()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuses connections for the length of the context."""
        port = self._server.server_port
        self._stop()
        try:
            yield
        finally:
            self._server = self._listen(port)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def spans(self) -> list[Seen]:
        with self._changed:
            return list(self._spans)

    def wait(
        self, condition: Callable[[list[Seen]], bool], shown: Callable[[list[Seen]], object] | None = None
    ) -> list[Seen]:
        """Waits until the spans are as wanted, and returns them. ``shown``: what a failed test shows of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self._spans), DEADLINE), (shown or names)(self._spans)
            return list(self._spans)

    def tree(self, trace: str, outline: str, outer: str = "") -> dict[str, Seen]:
        """Waits until the spans of a trace have this outline below ``outer``, and returns them by name."""

        def shown(spans: list[Seen]) -> str:
            return outline_of([one for one in spans if one.trace == trace], outer)

        found = self.wait(lambda spans: shown(spans) == outline, shown)
        return {one.name: one for one in found if one.trace == trace}

    def wait_requests(self, count: int) -> None:
        """Waits until so many requests have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.requests >= count, DEADLINE)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.took(self.path, body)
                collector.hold.wait()
                self.send_response(collector.status)
                self.send_header("location", "/elsewhere")
                self.send_header("connection", "close")
                self.end_headers()
                try:
                    while collector.endless and not collector.closing.is_set():
                        self.wfile.write(b"x" * 65536)
                        collector.sent_bytes += 65536
                except OSError:
                    pass

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def took(self, path: str, body: bytes) -> None:
        spans = list(_decoded(body)) if self.status == 200 else []
        with self._changed:
            self.requests += 1
            self.paths.add(path)
            self.bodies.append(body)
            self._spans += spans
            self._changed.notify_all()


@contextmanager
def collecting() -> Iterator[Collector]:
    """Yields a collector for the length of the context."""
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def names(spans: list[Seen]) -> list[str]:
    return sorted(f"{one.service}: {one.name}" for one in spans)


def outline_of(spans: list[Seen], outer: str = "") -> str:
    """Returns the names of the spans below one, in the order of their beginnings, each with its error and its own.

    For example ``root(fetch encode:queue_full encode generate(decode))``. Spans that hang elsewhere follow after ``+``.
    """
    ids = {outer} | {one.id for one in spans}
    elsewhere = sorted(one.name for one in spans if one.parent not in ids)
    return _below(spans, outer) + "".join(f" +{name}" for name in elsewhere)


def _below(spans: list[Seen], outer: str) -> str:
    shown = []
    for one in sorted((one for one in spans if one.parent == outer), key=lambda one: one.began):
        inner = _below(spans, one.id)
        shown.append(one.name + (f":{one.error}" if one.error else "") + (f"({inner})" if inner else ""))
    return " ".join(shown)


def _decoded(body: bytes) -> Iterator[Seen]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        about = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Seen(
                    span.name,
                    str(about["service.name"]),
                    {2: "server", 3: "client"}.get(span.kind, "internal"),
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _values(span.attributes),
                    tuple((event.name, _values(event.attributes)) for event in span.events),
                    (span.status.message or "error") if span.status.code == 2 else "",
                    span.trace_state,
                )


def _values(attributes: Any) -> dict[str, Any]:
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        found[one.key.removeprefix("embferry.")] = None if kind is None else getattr(one.value, kind)
    return found
