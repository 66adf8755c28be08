"""The parent of the plug-in's spans of one request, and the spans of a part that an encoder sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embferry.traces.context import PARENT, STATE, TraceContext, parse
from embferry.traces.spans import Kind, Span, Tracer

CARRIERS = "root_span_context", "root_span_carrier"
"""Keys under which SGLang hands the headers of its own span of a request to another process."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """A span of a request, and the maker of its child spans. Any thread.

    Attributes:
        tracer: Makes the spans.
        around: The span that they are parts of.
    """

    tracer: Tracer
    around: TraceContext

    def begin(self, name: str, kind: Kind = "internal") -> Span:
        """Returns a span that begins now."""
        return self.tracer.begin(name, self.around, kind)


def context_of(state: Mapping[str, object]) -> TraceContext | None:
    """Returns SGLang's own span of a request.

    Args:
        state: What SGLang tells another process of the trace of the request.

    Returns:
        None if the request is not recorded.
    """
    for name in CARRIERS:
        carrier = state.get(name)
        if isinstance(carrier, dict):
            context = parse(str(carrier.get(PARENT, "")), str(carrier.get(STATE, "")))
            return context if context is not None and context.sampled else None
    return None


class OutgoingTrace:
    """The spans of one part at its encoder, from now on. The event loop of the encoder calls the methods.

    ``prepare`` lasts until the length is known, ``encoder`` until the embedding is there; each transfer is a ``send``.

    Args:
        trace: The call of the dispatcher.
    """

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        self._stage: Span | None = trace.begin("prepare")

    def announced(self) -> None:
        """The length is known; the encoder runs from now on."""
        self._end_stage()
        self._stage = self._trace.begin("encoder")

    def encoded(self, tokens: int) -> None:
        """The embedding is there."""
        if self._stage is not None:
            self._stage.set(tokens=tokens)
        self._end_stage()

    def sends(self) -> Span:
        """Returns the span of a transfer that begins now."""
        return self._trace.begin("send")

    def end(self, outcome: str) -> None:
        """The call is over. ``outcome``: a word for what has become of the embedding, if it is not there."""
        self._end_stage(outcome)

    def _end_stage(self, error: str = "") -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.end(error)
