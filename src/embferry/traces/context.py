"""The place of a request in a trace, as W3C has it (Trace Context): ``traceparent`` and ``tracestate``. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_STATE, MAX_MEMBERS = 512, 32
"""Characters and members of a ``tracestate`` that are passed on; a longer one is dropped."""
PARENT, STATE = "traceparent", "tracestate"
_SAMPLED = 1
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_PARENT = 256
"""Characters of a ``traceparent`` that are read: later versions may be longer than this one's 55."""
_KEY = r"[a-z0-9][a-z0-9_\-*/@]{0,255}"
_MEMBER = re.compile(rf"{_KEY}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span, as other processes know it.

    Attributes:
        trace_id: of its trace, 128 bits.
        span_id: its own, 64 bits.
        sampled: the spans of the trace are recorded.
        state: what tracing systems of the client pass on, as the header has it.
    """

    trace_id: int
    span_id: int
    sampled: bool
    state: str = ""

    @property
    def parent(self) -> str:
        """The ``traceparent`` of what is done for this span."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{_SAMPLED if self.sampled else 0:02x}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request that is made for this span."""
        return {PARENT: self.parent} | ({STATE: self.state} if self.state else {})


def parse(parent: str, state: str = "") -> TraceContext | None:
    """Returns the context in the values of both headers; None if ``traceparent`` is malformed.

    A malformed or long ``tracestate`` is left out.
    """
    found = _PARENT.fullmatch(parent) if len(parent) <= _MAX_PARENT else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    is_sampled = bool(int(flags, 16) & _SAMPLED)
    return TraceContext(int(trace_id, 16), int(span_id, 16), is_sampled, _checked(state))


def context_in(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Returns the context in the headers of a request, whose names have small letters; None without a valid one."""
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    if len(parents) != 1:
        return None
    return parse(parents[0].decode("latin-1").strip(), b",".join(states[:MAX_MEMBERS]).decode("latin-1"))


def _checked(state: str) -> str:
    """Returns a ``tracestate`` without white space and empty members; an empty text for a malformed or long one."""
    if not state or len(state) > MAX_STATE:
        return ""
    members = [member for part in state.split(",") if (member := part.strip(" \t"))]
    is_right = len(members) <= MAX_MEMBERS and all(map(_MEMBER.fullmatch, members))
    keys = {member.partition("=")[0] for member in members}
    return ",".join(members) if is_right and len(keys) == len(members) else ""
