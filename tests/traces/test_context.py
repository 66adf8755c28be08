"""The headers of W3C's Trace Context: what is read, what is passed on, and what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from embferry.traces.context import MAX_MEMBERS, MAX_STATE, context_in, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_context_is_read_and_written() -> None:
    context = parse(GOOD, "vendor=a:1, other@tenant=b")
    assert context is not None
    assert (f"{context.trace_id:032x}", f"{context.span_id:016x}", context.sampled) == (TRACE, SPAN, True)
    assert context.headers == {"traceparent": GOOD, "tracestate": "vendor=a:1,other@tenant=b"}


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("ff", True)])
def test_the_flag_decides_whether_spans_are_recorded(flags: str, sampled: bool) -> None:
    context = parse(f"00-{TRACE}-{SPAN}-{flags}")
    assert context is not None
    assert context.sampled is sampled
    assert context.parent == f"00-{TRACE}-{SPAN}-{int(sampled):02x}"


def test_a_later_version_may_be_longer() -> None:
    assert parse(f"01-{TRACE}-{SPAN}-01-more") == parse(GOOD)


@pytest.mark.parametrize(
    "wrong",
    [
        "", "00", GOOD.upper(), GOOD + "-more", GOOD + " ", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{SPAN}-01", f"00-{TRACE}-{SPAN}0-01", f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-0g", GOOD + "\n", f"01-{TRACE}-{SPAN}-01-{'x' * 300}",
    ],
)  # fmt: skip
def test_a_malformed_parent_counts_as_none(wrong: str) -> None:
    assert parse(wrong) is None


@pytest.mark.parametrize(
    "state",
    [
        "a=" + "x" * MAX_STATE, ",".join(f"k{n}=v" for n in range(MAX_MEMBERS + 1)), "novalue", "A=b", "a=b,a=c",
        "a=b\x00", "a=b\r\nx: y", "a=ü", "a==b", "=b", "a=",
    ],
)  # fmt: skip
def test_a_malformed_or_long_state_is_left_out(state: str) -> None:
    context = parse(GOOD, state)
    assert context is not None
    assert context.state == ""


@given(some.text(max_size=80), some.text(max_size=80))
def test_any_text_is_read_without_an_error(parent: str, state: str) -> None:
    parse(parent, state)


def test_headers_are_read_once_or_not_at_all() -> None:
    parent, state = (b"traceparent", GOOD.encode()), (b"tracestate", b"a=b")
    assert context_in([(b"host", b"x"), parent, state, (b"tracestate", b"c=d")]) == parse(GOOD, "a=b,c=d")
    assert context_in([parent, parent]) is None
    assert context_in([state]) is None
    assert context_in([(b"traceparent", b"\xff")]) is None
