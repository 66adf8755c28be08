"""Spans of a router in the process of a test, without a collector, and what a test compares them with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from embferry.traces.context import TraceContext, parse
from embferry.traces.spans import PREFIX, Span, Tracer, Value
from tests.collector import Seen, outline_of

TRACE, OUTER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{OUTER}-01"
MALFORMED = {
    "no hyphens": [("traceparent", "x" * 55)],
    "upper case": [("traceparent", PARENT.upper())],
    "no letters of ASCII": [("traceparent", "\xff\xfe")],
    "zeros": [("traceparent", f"00-{'0' * 32}-{OUTER}-01")],
    "long": [("traceparent", "00-" + "a" * 8000)],
    "twice": [("traceparent", PARENT), ("traceparent", PARENT)],
    "a state alone": [("tracestate", "vendor=x")],
}
"""Headers of clients that name no span."""


def recorded(monkeypatch: pytest.MonkeyPatch, share: float = 1.0) -> list[Span]:
    """Returns the list to which every router that is made from now on adds its spans when they end."""
    from embferry.serve.http import backends  # brings the router with it

    seen: list[Span] = []
    monkeypatch.setattr(backends, "open_tracer", lambda *_: Tracer(seen.append, share))
    return seen


def named(spans: Sequence[Span], name: str) -> Span:
    """Returns the only span of this name."""
    (found,) = (span for span in spans if span.name == name)
    return found


def outline(spans: Sequence[Span], outer: str = "") -> str:
    """Returns the outline of the spans below one, as :func:`.outline_of` does."""
    return outline_of([_as_seen(span) for span in spans], outer)


def facts(values: dict[str, Value]) -> dict[str, Value]:
    """Returns attributes without their prefix."""
    return {name.removeprefix(PREFIX): value for name, value in values.items()}


def is_nested(spans: Sequence[Span]) -> bool:
    """Returns whether each span lies within the one around it."""
    times = {span.context: span.times for span in spans}
    around = [(span.times, times[span.parent]) for span in spans if span.parent in times]
    return all(outer[0] <= inner[0] <= inner[1] <= outer[1] for inner, outer in around)


def client_span() -> TraceContext:
    """Returns the span that ``PARENT`` names."""
    context = parse(PARENT)
    assert context is not None
    return context


def _as_seen(span: Span) -> Seen:
    context, parent = span.context, span.parent
    return Seen(
        name=span.name,
        service="",
        kind=span.kind,
        trace=f"{context.trace_id:032x}",
        id=f"{context.span_id:016x}",
        parent="" if parent is None else f"{parent.span_id:016x}",
        began=span.times[0],
        ended=span.times[1],
        attributes=facts(span.attributes),
        events=tuple((name, facts(told)) for _, name, told in span.events),
        error=span.error,
        state=context.state,
    )
