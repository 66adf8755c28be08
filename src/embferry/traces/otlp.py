"""Sends spans to a collector: OTLP over HTTP, with OpenTelemetry's SDK, from a thread of its own.

A collector that is down, slow or hostile costs spans and nothing else. Ended spans wait in a queue of bounded size;
a full one drops the newest. OpenTelemetry's own processor has no bound on the time of its end below 30 seconds, and
logs each failure, so the queue is ours; the format, the requests and their repetition are OpenTelemetry's. Nothing of
an answer but its head is read.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from embferry.protocol.errors import EmbferryError
from embferry.protocol.text import printable
from embferry.traces.context import TraceContext
from embferry.traces.spans import Span, Tracer
from embferry.trust.occasions import Occasions, more

log = logging.getLogger(__name__)

MAX_QUEUED, MAX_BATCH = 8192, 512
"""Spans and events that wait, some megabytes; spans of one request to the collector."""
DELAY = 1.0
"""Seconds for which a span waits for others."""
TIMEOUT = 5.0
"""Seconds for one request to the collector with its repetitions, about."""
CLOSE_SECONDS = 1.5
"""Seconds for the last spans at the end of the process."""
PATH = "/v1/traces"
_LOGGER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_INSTALL = "install embferry[traces]: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"


def open_tracer(
    endpoint: str | None, service: str, share: float = 1.0, setting: str = "traces.endpoint"
) -> Tracer | None:
    """Returns a tracer whose spans go to a collector. Without a collector, imports nothing and returns None.

    Args:
        endpoint: URL of the collector; without a path, ``/v1/traces`` is added.
        service: the name of this kind of process.
        share: of the traces that begin here, those that are sampled.
        setting: the name of the setting with the endpoint, for errors.

    Raises:
        EmbferryError: OpenTelemetry is not installed, or not as this needs it.
    """
    if endpoint is None:
        return None
    exporter = Exporter(url_of(endpoint), service, setting)
    return Tracer(exporter.add, share, exporter.close)


def url_of(endpoint: str) -> str:
    """Returns the URL to which spans are posted."""
    return endpoint.rstrip("/") + PATH if urlsplit(endpoint).path in ("", "/") else endpoint


class Exporter:
    """The queue of ended spans, and the thread that sends them. Any thread may call the methods.

    Args:
        url: of the collector.
        service: the name of this kind of process.
        setting: the name of the setting with the URL, for errors.
        clock: monotonic seconds.

    Raises:
        EmbferryError: OpenTelemetry is not installed.
    """

    def __init__(
        self, url: str, service: str, setting: str = "traces.endpoint", clock: Callable[[], float] = time.monotonic
    ) -> None:
        try:
            self._sending = _Sending(url, service)
        except ImportError as error:
            why = f"{setting} is set, and OpenTelemetry cannot be imported ({error})"
            raise EmbferryError(f"{why}; {_INSTALL}") from error
        self._url = url
        self._changed = threading.Condition()
        self._queue: deque[Span] = deque()
        self._queued = 0  # spans and events in the queue
        self._closing = False
        self._lost = 0
        self._failing = False
        self._occasions = Occasions(clock)
        self._thread = threading.Thread(target=self._run, name="embferry-traces", daemon=True)
        self._thread.start()

    def add(self, span: Span) -> None:
        """Queues an ended span, or drops it if too much waits. Never blocks for long, never raises."""
        with self._changed:
            if self._closing:
                return
            if self._queued >= MAX_QUEUED:
                self._lost += 1
                return
            self._queue.append(span)
            self._queued += _size(span)
            if len(self._queue) in (1, MAX_BATCH):
                self._changed.notify()

    def close(self) -> None:
        """Sends the last spans, for at most ``CLOSE_SECONDS``. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            self._queue.clear()
        self._sending.close()

    def _run(self) -> None:
        while batch := self._next():
            reason = self._sending.send(batch)
            if reason:
                self._failed(reason, len(batch))
            else:
                self._succeeded()

    def _next(self) -> list[Span]:
        """Returns the next spans to send; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(lambda: len(self._queue) >= MAX_BATCH or self._closing, DELAY)
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]
            self._queued -= sum(map(_size, batch))
            return batch

    def _failed(self, reason: str, spans: int) -> None:
        """Counts lost spans, and logs the first failure of a row."""
        with self._changed:
            self._lost += spans
        if not self._failing and not self._closing:
            self._failing = True
            if (count := self._occasions.count("failed")) is not None:
                why = printable(reason, 200)
                log.warning("spans do not reach the collector at %s: %s%s", self._url, why, more(count))

    def _succeeded(self) -> None:
        """Logs how many spans were lost, if any were."""
        self._failing = False
        if self._lost and self._occasions.count("lost") is not None:
            with self._changed:
                lost, self._lost = self._lost, 0
            log.info("spans reach the collector at %s; %d were lost before", self._url, lost)


class _Sending:
    """OpenTelemetry's exporter, without its log lines.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, url: str, service: str) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(name)

        self._api, self._sdk = module("opentelemetry.trace"), module("opentelemetry.sdk.trace")
        exporting = module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        requests = module("requests")
        self._success = module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS
        resources, scopes = module("opentelemetry.sdk.resources"), module("opentelemetry.sdk.util.instrumentation")
        self._resource = resources.Resource.create({"service.name": service})
        self._scope = scopes.InstrumentationScope("embferry")
        session = requests.Session()
        session.trust_env = False  # no proxy, and no password from ~/.netrc
        session.stream = True  # the body of an answer is not read
        session.hooks["response"] = self._head_only
        self._redirected = requests.exceptions.HTTPError
        self._exporter = exporting.OTLPSpanExporter(endpoint=url, timeout=TIMEOUT, session=session)
        self._is_closed = False

    def send(self, spans: list[Span]) -> str:
        """Sends spans. Returns why they could not be sent; an empty text if they were. Never raises."""
        with _Silence() as silence:
            try:
                if self._exporter.export([self._converted(span) for span in spans]) is self._success:
                    return ""
            except Exception as error:  # noqa: BLE001  (foreign code; without this thread later spans would be lost)
                return f"{type(error).__name__}: {error}"
        return silence.said or "it failed"

    def close(self) -> None:
        """Ends a request that is under way, and its repetitions. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()

    def _head_only(self, response: Any, *args: Any, **keywords: Any) -> Any:
        response.close()
        if 300 <= response.status_code < 400:  # it is not followed, and OpenTelemetry takes it for a success
            raise self._redirected(f"status {response.status_code}")
        return response

    def _converted(self, span: Span) -> Any:
        api, sdk = self._api, self._sdk
        began, ended = span.times
        codes = api.StatusCode
        return sdk.ReadableSpan(
            span.name,
            context=self._context(span.context, is_remote=False),
            parent=None if span.parent is None else self._context(span.parent, is_remote=True),
            resource=self._resource,
            attributes=span.attributes,
            events=[sdk.Event(name, facts, span.at(at)) for at, name, facts in span.events],
            kind=getattr(api.SpanKind, span.kind.upper()),
            status=api.Status(codes.ERROR, span.error) if span.error else api.Status(codes.UNSET),
            start_time=began,
            end_time=ended,
            instrumentation_scope=self._scope,
        )

    def _context(self, context: TraceContext, *, is_remote: bool) -> Any:
        api = self._api
        state = api.TraceState.from_header([context.state]) if context.state else None
        return api.SpanContext(
            context.trace_id, context.span_id, is_remote, api.TraceFlags(api.TraceFlags.SAMPLED), state
        )


class _Silence(logging.Filter):
    """Keeps back what OpenTelemetry logs on this thread: the log has one line of ours instead.

    Attributes:
        said: the last of these lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said = ""
        self._thread = threading.get_ident()

    def __enter__(self) -> _Silence:
        logging.getLogger(_LOGGER).addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_LOGGER).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self.said = record.getMessage()
        return False


def _size(span: Span) -> int:
    return 1 + len(span.events)
