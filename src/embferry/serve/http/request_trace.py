"""The spans of one request at a router: what its record tells becomes one tree, under the client's span if it has one.

The record calls these methods, so the journal and the trace tell the same. Workers hang their spans under the call that
they answer, whose headers name it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from embferry.traces.context import context_in
from embferry.traces.spans import Span, Tracer, Value

MAX_CALLS = 64
"""Calls of a request that have spans of their own."""
NAMES = {"encode": "encode", "language": "generate"}
"""The span of a call, by the role of its worker; others have the name of the role."""
_KINDS = {"images": "image", "videos": "video", "sounds": "audio"}
_FINE = ("answered", "client left")
_TOLD_OTHERWISE = {"resumed", "error", "worker_found", "worker_lost"}
"""Events of the transfer and the error of the root, which spans tell otherwise; and those of no request."""


class Call:
    """A request to a worker, which ends with the context.

    Attributes:
        headers: those that name its span to the worker; empty without one.
    """

    __slots__ = ("_decode", "_span", "headers")

    def __init__(self, span: Span | None, headers: Mapping[str, str]) -> None:
        self._span, self.headers = span, headers
        self._decode: Span | None = None

    def begin_decode(self) -> None:
        """Begins the span of the decode below it, unless the call has ended."""
        if self._span is not None and self._span.ended is None:
            self._decode = self._span.begin("decode")

    def end(self, error: str = "") -> None:
        """Ends the call, unless it has ended."""
        for span in (self._decode, self._span):
            if span is not None:
                span.end(error)

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(_code(error) if isinstance(error, Exception) else "")  # not if it was cancelled


NO_CALL = Call(None, MappingProxyType({}))
"""The call of a request without a trace."""


class RequestTrace:
    """The spans of one request. It belongs to the event loop, as the journal does.

    Args:
        tracer: makes the spans.
        path: one of the router's paths.
        headers: of the request; its ``traceparent`` may name a span of the client.
        number: of the request in this router's log.
        tells_decode: the worker that answers has no span for the decode, so this one notes it.
    """

    def __init__(
        self, tracer: Tracer, path: str, headers: Iterable[tuple[bytes, bytes]], number: int, *, tells_decode: bool
    ) -> None:
        self._root = tracer.begin(f"POST {path}", context_in(headers), "server")
        self._root.set(request=number)
        self._fetch = self._root.begin("fetch")
        self._calls: list[Call] = []
        self._generate: Call = NO_CALL
        self._tells_decode = tells_decode

    @property
    def id(self) -> str:
        """The id of the trace, as collectors show it."""
        return f"{self._root.context.trace_id:032x}"

    def describe(self, *, streams: bool, kinds: Collection[str]) -> None:
        """Notes what was asked; see :meth:`.RequestRecord.describe`."""
        counts = {name: sum(one == kind for one in kinds) for name, kind in _KINDS.items()}
        self._root.set(stream=streams, **counts)
        self._fetch.set(**counts)

    def phase(self, name: str) -> None:
        """A phase begins. The body and the media are there."""
        if name != "fetch":
            self._fetch.end()

    def asks(self, role: str, worker: str) -> Call:
        """A worker is asked."""
        self._fetch.end()
        if len(self._calls) >= MAX_CALLS:
            return Call(None, self._root.context.headers)
        span = self._root.begin(NAMES.get(role, role), "client")
        span.set(worker=worker)
        call = Call(span, span.context.headers)
        self._calls.append(call)
        if role == "language":
            self._generate = call
        return call

    def event(self, kind: str, facts: Mapping[str, str]) -> None:
        """Something has happened to the request; see :class:`.Event`. Its reason, which may quote, stays here."""
        if kind not in _TOLD_OTHERWISE:
            self._root.event(kind, **{name: text for name, text in facts.items() if name != "reason"})

    def progress(self, transfer: Mapping[str, Any]) -> None:
        """A part of the embedding has arrived; see :meth:`.RequestRecord.progress`."""
        told: dict[str, Value] = {name: transfer[name] for name in ("tokens", "bytes", "transport", "transfers")}
        self._root.set(**told)

    def first_token(self) -> None:
        """The first token has arrived, and goes to the client."""
        self._root.event("first_token")
        if self._tells_decode:
            self._generate.begin_decode()

    def end(self, outcome: str, attempts: int) -> None:
        """Ends every span that has not ended."""
        error = "" if outcome in _FINE else outcome
        for call in self._calls:
            call.end(error)
        self._fetch.end(error)
        self._root.set(outcome=outcome, attempts=attempts)
        self._root.end(error)


def _code(error: Exception) -> str:
    """Returns the code of an error: a word of ours, or the name of a class."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else type(error).__name__
