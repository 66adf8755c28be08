"""The spans of one job of a language worker, made at its end from the times that it has noted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from embferry.traces.context import TraceContext
from embferry.traces.spans import Span, Tracer


class JobTrace:
    """The spans of a job: ``prompt``, ``transfer``, ``prefill`` and ``decode``.

    Args:
        tracer: makes the spans.
        parent: the router's call.
    """

    def __init__(self, tracer: Tracer, parent: TraceContext) -> None:
        self._tracer, self._parent = tracer, parent
        self._grants: list[tuple[float, int]] = []  # when a transfer after the initial one was seen, and its number

    def transfers(self, count: int) -> None:
        """Notes the number of transfers that have begun. Runs on the driver thread; never raises."""
        known = self._grants[-1][1] if self._grants else 1
        if count > known:
            self._grants.append((time.monotonic(), count))

    def end(self, marks: Mapping[str, float], transfer: Mapping[str, Any] | None, error: str, tokens: int) -> None:
        """Makes the spans. The last of them that has begun has the error.

        Args:
            marks: the times of the stages that the job has reached.
            transfer: the facts about its transfer, as the router gets them; None without one.
            error: the code of the error that has ended it; empty if none has.
            tokens: those of the answer.
        """
        now, begin = marks.get("ended", time.monotonic()), self._tracer.begin
        spans: list[tuple[Span, float]] = [
            (begin("prompt", self._parent, at=marks["submitted"]), marks.get("opened", now))
        ]
        opened = marks.get("opened")
        if opened is not None and transfer is not None:
            span = begin("transfer", self._parent, at=opened)
            self._tell(span, marks, transfer)
            spans.append((span, marks.get("last_token_here", now)))
        if "scheduled" in marks:
            spans.append((begin("prefill", self._parent, at=marks["scheduled"]), marks.get("first_token", now)))
        if "first_token" in marks:
            span = begin("decode", self._parent, at=marks["first_token"])
            span.set(tokens=tokens)
            spans.append((span, now))
        for number, (span, ended) in enumerate(spans, 1):
            span.end(error if number == len(spans) else "", ended)

    def _tell(self, span: Span, marks: Mapping[str, float], transfer: Mapping[str, Any]) -> None:
        count = transfer["initial"] + transfer["resumed"]
        names = {"tokens": "total_tokens", "bytes": "bytes", "transport": "transport", "resumed": "resumed"}
        told = {name: transfer[key] for name, key in names.items()}
        if told["tokens"] >= 0:  # the length is known
            span.set(**told)
        if (first := marks.get("first_token_here")) is not None:
            span.event("first_tokens", first)
        for at, number in self._grants:
            span.event("resumed", at, transfer=number)
        if count > (self._grants[-1][1] if self._grants else 1):  # seen at the end only
            span.event("resumed", marks.get("last_token_here"), transfer=count)
