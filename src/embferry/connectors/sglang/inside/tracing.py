"""Spans of the plug-in in SGLang's own traces: in the same tree, and through the same exporter.

SGLang's option ``--enable-trace`` switches them on; nothing of OpenTelemetry is imported before.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterable
from functools import cache
from typing import Any

from sglang.srt.observability import trace

from embferry.protocol.errors import shown
from embferry.traces.context import TraceContext, context_in
from embferry.traces.spans import Span, Tracer
from embferry.transfer.failures import attempt
from embferry.trust.occasions import Occasions, more

from ..request_trace import RequestTrace, context_of

log = logging.getLogger(__name__)


def of_state(state: Any) -> RequestTrace | None:
    """Returns the trace of a request from what SGLang tells an encoder of it; None unless spans of it are wanted."""
    if not trace.get_global_tracing_enabled() or not state:
        return None
    return _below(context_of(state.get("trace_ctx") or {}))


def of_request(request: Any) -> RequestTrace | None:
    """Returns the trace of a request that a scheduler was given; None unless spans of it are wanted."""
    known = request.time_stats.trace_ctx if trace.get_global_tracing_enabled() and request.time_stats else None
    return _below(context_of(known.__getstate__())) if known is not None and known.tracing_enable else None


def of_headers(headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace | None:
    """Returns the trace of a call to an encoder; None unless spans of it are wanted."""
    context = context_in(headers) if trace.get_global_tracing_enabled() else None
    return _below(context) if context is not None and context.sampled else None


def _below(context: TraceContext | None) -> RequestTrace | None:
    return None if context is None else RequestTrace(_tracer(), context)


@cache
def _tracer() -> Tracer:
    """Returns what makes the spans of this process. Two of them at the first requests would do no harm."""
    return Tracer(Export())


class Export:
    """Hands spans that have ended to SGLang's exporter, which sends them from a thread of its own. Any thread.

    An error costs the span and nothing else.
    """

    def __init__(self) -> None:
        self._api = importlib.import_module("opentelemetry.trace")
        self._tracer = self._api.get_tracer("embferry")
        self._lock = threading.Lock()  # guards the count of errors
        self._occasions = Occasions()

    def __call__(self, span: Span) -> None:
        """Hands a span over. Does not block, and raises nothing."""
        error = attempt(self._hand_over, span)
        if error is not None:
            with self._lock:
                count = self._occasions.count("failed")
            if count is not None:
                log.warning("a span does not reach SGLang's exporter: %s%s", shown(error), more(count))

    def _hand_over(self, span: Span) -> None:
        """Repeats the span with OpenTelemetry's means. Its number is kept: other processes have it already."""
        codes, (began, ended) = self._api.StatusCode, span.times
        kind, around = getattr(self._api.SpanKind, span.kind.upper()), self._around(span.parent)
        number = trace.TraceCustomIdGenerator.preset_next_span_id
        number(span.context.span_id)
        try:
            made = self._tracer.start_span(span.name, around, kind, span.attributes, start_time=began)
        finally:
            number(None)  # otherwise SGLang's next span could get it
        for at, name, facts in span.events:
            made.add_event(name, facts, span.at(at))
        if span.error:
            made.set_status(self._api.Status(codes.ERROR, span.error))
        made.end(ended)

    def _around(self, parent: TraceContext | None) -> Any:
        api = self._api
        assert parent is not None
        flags = api.TraceFlags(api.TraceFlags.SAMPLED)
        state = api.TraceState.from_header([parent.state]) if parent.state else None
        around = api.SpanContext(parent.trace_id, parent.span_id, True, flags, state)
        return api.set_span_in_context(api.NonRecordingSpan(around))
