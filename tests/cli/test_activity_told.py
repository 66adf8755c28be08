"""Messages of a router are checked, and their texts can be shown."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from embferry.cli.activity.feed import MAX_EVENT_BYTES, Events
from embferry.cli.activity.told import NotActivityError, Shown, read
from embferry.serve.config import MIB
from embferry.serve.http.journal import MAX_TEXT
from tests.cli.messages import event, hostile, message, pool, request, told, worker

FULL = message(
    requests=[request(1, ("fetch", 0.0, None), transfer={"tokens": 1, "total_tokens": 2, "transport": "shm"})],
    events=[event(1, "worker_failed", worker="encode0", role="encode", code="c", reason="r")],
    samples={"ttft": [[99, 1, 0.5, 0.5, 0.5]]},
    missing=["no language worker has a live lease"],
)


def texts(value: Any) -> list[str]:
    """Returns every text that a message has, however deep."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    fields = getattr(value, "__struct_fields__", ())
    return [text for one in (*parts, *(getattr(value, name) for name in fields)) for text in texts(one)]


@given(st.text(min_size=1, max_size=600))
def test_no_text_of_a_router_can_do_more_than_be_read(text: str) -> None:
    found = texts(read(json.dumps(hostile(FULL, text)).encode()))
    assert len(found) > 15
    for one in found:
        assert isinstance(one, Shown)
        assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in one)
        assert len(one) <= 6 * (MAX_TEXT + 1)


def test_fields_of_a_later_version_are_left_out() -> None:
    later = message(workers=[worker("encode0", weight=3)], news={"a": [1]}, requests=[request(1, priority=1)])
    assert read(json.dumps(later).encode()).workers[0].id == "encode0"


@pytest.mark.parametrize(
    "changes",
    [
        {"now": "soon"},
        {"now": 1e300},
        {"version": None},
        {"running": [-1]},
        {"running": [True]},
        {"requests": [request(1, phases=[])]},
        {"requests": [request(1, phases=[["fetch", 0.0]])]},
        {"requests": [{"number": 1}]},
        {"workers": [worker("encode0", up="yes")]},
        {"workers": [worker("encode0") | {"id": 5}]},
        {"pools": [pool("language0", used=-1)]},
        {"pools": {}},
        {"samples": {"ttft": [[1, 2]]}},
        {"samples": {"ttft": [[1, 2, -1.0, 1.0, 1.0]]}},
        {"samples": {"ttft": [[1, 2, 1.0, 1.0, -1.0]]}},
        {"totals": {"x": None}},
        {"missing": [None]},
    ],
)
def test_a_message_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(NotActivityError):
        told(**changes)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'{"now": NaN}', b"[" * 100_000, b"\x16\x03\x01"])
def test_what_is_no_message_is_refused_in_one_short_line(data: bytes) -> None:
    with pytest.raises(NotActivityError) as refusal:
        read(data)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 6 * (MAX_TEXT + 1)


# The stream


@given(st.lists(st.integers(1, 40)), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_they_arrive(cuts: list[int], newline: bytes) -> None:
    lines = [b"data: 1", b"", b": nothing new", b"", b"event: x", b"data:2", b"data: 3", b"", b"", b"data: 4"]
    stream = newline.join(lines) + newline
    events, found = Events(), []
    for cut in (*cuts, len(stream)):
        found += events.take(stream[:cut])
        stream = stream[cut:]
    assert found == [b"1", b"2\n3"]  # the last one has not ended
    assert events.take(newline) == [b"4"]


@pytest.mark.parametrize("piece", [b"x" * MIB, b"data: " + b"x" * MIB, b"data: " + b"x" * MIB + b"\n"])
def test_an_event_that_never_ends_is_refused(piece: bytes) -> None:
    events = Events()

    def read_on() -> None:
        for _ in range(MAX_EVENT_BYTES // MIB + 1):
            assert events.take(piece) == []

    with pytest.raises(NotActivityError, match=f"more than {MAX_EVENT_BYTES:,} bytes"):
        read_on()
