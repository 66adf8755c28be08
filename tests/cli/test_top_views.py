"""Lines, bars and columns of ``embferry top``: they fit any width."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.cells import cell_len
from rich.text import Text

from embferry.cli.activity.told import Request
from embferry.cli.top.bars import BLOCKS, bar, columns, gauge, nice_ceiling
from embferry.cli.top.board import Board
from embferry.cli.top.events import event_lines
from embferry.cli.top.fleet import fleet_lines
from embferry.cli.top.header import router_lines
from embferry.cli.top.lines import clock
from embferry.cli.top.requests import request_line, scale_of
from embferry.cli.top.timeline import timeline_lines
from embferry.cli.top.times import times_lines
from tests.cli.messages import event, hostile, message, pool, request, told, worker

FIVE = 300.0


def one(*phases: tuple[str, float, float | None], **changes: Any) -> Request:
    return told(requests=[request(1, *phases, **changes)]).requests[0]


def drawn(request: Request, width: int, scale: float, now: float = 0.0) -> str:
    return bar(request, request.phases, now, scale, width).plain


def test_a_bar_has_each_phase_where_it_was() -> None:
    ended = one(("fetch", 100.0, 101.0), ("encode", 101.0, 104.0), ("decode", 104.0, 108.0))
    assert drawn(ended, 10, 10.0) == "fe  d     "
    assert drawn(ended, 20, 10.0) == "f e     d           "
    assert drawn(ended, 10, 20.0) == "e d       "
    moving = one(("fetch", 100.0, 101.0), ("transfer", 101.0, None), transfer={"transfers": 4})
    assert drawn(moving, 10, 10.0, 109.0) == "ft ↻3     "
    assert drawn(moving, 10, 10.0, 104.0) == "ft        "  # no room for the resumes


def test_a_bar_of_a_short_request_is_a_cell() -> None:
    assert drawn(one(("fetch", 1.0, 1.001), ("decode", 1.001, 1.002)), 10, 10.0) == "d         "


SECONDS = st.floats(-1e15, 1e15) | st.floats(0, 100)
PHASES = st.lists(
    st.tuples(st.sampled_from(["fetch", "encode", "transfer", "decode", "x", ""]), SECONDS, st.none() | SECONDS),
    min_size=1, max_size=6,
)  # fmt: skip


@given(PHASES, SECONDS, SECONDS, st.floats(0.01, 1e15), st.integers(1, 80))
def test_a_bar_has_its_width(phases: list[Any], began: float, now: float, scale: float, width: int) -> None:
    made = drawn(one(*phases, began=began, transfer={"transfers": 9}), width, scale, now)
    assert cell_len(made) == width


@given(st.floats(0, 2), st.floats(0, 2), st.integers(1, 40))
def test_a_gauge_has_its_width(first: float, second: float, width: int) -> None:
    assert cell_len(gauge([(first, "#ffffff"), (second, "#000000")], width).plain) == width


def test_a_gauge_shows_little_and_nothing() -> None:
    assert gauge([(0.001, "#ffffff")], 8).plain == "▄▁▁▁▁▁▁▁"
    assert gauge([(0.0, "#ffffff")], 8).plain == "▁▁▁▁▁▁▁▁"
    assert gauge([(0.5, "#ffffff"), (0.25, "#000000")], 8).plain == "▄▄▄▄▄▄▁▁"


def test_columns_are_as_high_as_their_values() -> None:
    made = columns([None, (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.25, 1.0)], 1.0, 2, "#ffffff", "#000000")
    assert [line.plain for line in made] == ["   ██", " ▁██▄"]
    assert BLOCKS[4] == "▄"


@given(st.lists(st.none() | st.tuples(SECONDS, SECONDS), max_size=30), st.floats(0.001, 1e15), st.integers(1, 5))
def test_columns_have_a_cell_for_each_value(values: list[Any], top: float, height: int) -> None:
    made = columns(values, top, height, "#ffffff", "#000000")
    assert [cell_len(line.plain) for line in made] == [len(values)] * height


@given(st.floats(1e-9, 1e15))
def test_a_round_number_is_not_less(value: float) -> None:
    assert value * 0.999 <= nice_ceiling(value) <= value * 2.01


WORKERS = st.builds(
    worker, st.sampled_from(["encode0", "language0", "language1"]), up=st.booleans(), in_flight=st.integers(0, 10**9)
)
POOLS = st.builds(pool, st.sampled_from(["language0", "language1"]), used=st.integers(0, 9), error=st.text(max_size=9))
REQUESTS = st.builds(
    lambda number, phases, **changes: request(number, *phases, **changes),
    st.integers(0, 99), PHASES, ttft=st.none() | SECONDS, attempts=st.integers(0, 9), began=SECONDS,
    transfer=st.none() | st.just({"tokens": 5, "total_tokens": 3, "transfers": 7, "bytes": 10**15}),
)  # fmt: skip
TIMES = st.floats(0, 1e15)
SAMPLES = st.lists(st.tuples(SECONDS, st.integers(0, 9), TIMES, TIMES, TIMES), max_size=9)
MESSAGES = st.builds(
    message,
    now=SECONDS,
    workers=st.lists(WORKERS, max_size=4),
    pools=st.none() | st.lists(POOLS, max_size=3),
    requests=st.lists(REQUESTS, max_size=6),
    events=st.lists(st.builds(event, st.integers(0, 9), st.sampled_from(["error", "resumed", "x"]), SECONDS)),
    samples=st.fixed_dictionaries({"ttft": SAMPLES, "transfer": SAMPLES}),
    missing=st.lists(st.text(max_size=30), max_size=2),
    under_way=st.integers(0, 999),
    engine=st.sampled_from(["embferry", "vllm"]),
)


def every_line(board: Board, at: float, width: int, height: int) -> list[Text]:
    rows = board.rows(at)
    scale = scale_of(rows)
    return [
        *(line for router in board.routers for line in router_lines(router, at, FIVE, width)),
        *fleet_lines(board, width),
        *(request_line(row, scale, width, chosen=row is rows[0]) for row in rows),
        *times_lines(board, at, 120.0, width, height),
        *event_lines(board, width),
        *(line for row in rows for line in timeline_lines(row, width)),
    ]


@given(
    st.lists(MESSAGES, min_size=1, max_size=3),
    st.sampled_from(["encode 0", "[bold]x[/]", "\x1b[2J", "红色的圆", "e\u0301" * 40]),
    st.booleans(),
    st.sampled_from([20, 40, 60, 80, 120, 200]),
)
def test_all_that_routers_tell_fits_any_width(messages: list[Any], text: str, is_gone: bool, width: int) -> None:
    board = Board([f"http://h:{n}" for n in range(len(messages))])
    every_line(board, 0.0, width, 2)  # before the first message
    for router, known in zip(board.routers, messages, strict=True):
        router.hear(told(**hostile(known, text)), 5.0, 1e9)
        router.hear(told(**known), 6.0, 1e9)
        router.hear(told(**hostile({**known, "first": False}, text)), 7.0, 1e9)
    if is_gone:
        board.routers[0].lose("no server responds", 8.0, 1.0)
    for line in every_line(board, 9.0, width, 2):
        assert cell_len(line.plain) <= width
        assert not any(ord(letter) < 32 for letter in line.plain)


def test_events_keep_their_time_of_day_when_a_message_is_late_or_the_router_is_gone() -> None:
    board = Board(["http://h:1"])
    router = board.routers[0]
    router.hear(told(now=100.0, events=[event(1, "error", 90.0, code="c")]), 5.0, 1_000_000.0)
    before = [line.plain for line in event_lines(board, 80)]
    assert clock(999_990.0) in before[0]
    router.hear(told(now=100.1, first=False), 9.0, 1_000_004.0)  # sent after 0.1 s, and 3.9 s under way
    assert [line.plain for line in event_lines(board, 80)] == before
    router.lose("gone", 67.0, 1.0)
    assert [line.plain for line in event_lines(board, 80)] == before
    assert board.rows(66.0) == []


def test_a_new_stream_has_a_time_of_day_of_its_own() -> None:
    board = Board(["http://h:1"])
    board.routers[0].hear(told(now=100.0), 5.0, 1_000_000.0)
    board.routers[0].lose("restarted", 6.0, 1.0)
    board.routers[0].hear(told(now=3.0, events=[event(1, "error", 2.0, code="c")]), 9.0, 1_000_004.0)
    assert clock(1_000_003.0) in event_lines(board, 80)[0].plain


def test_requests_of_all_routers_are_in_one_order() -> None:
    board = Board(["http://h:1", "http://h:2"])
    board.routers[0].hear(
        told(now=100.0, requests=[request(1, ("fetch", 90.0, None)), request(2, ("fetch", 1.0, 99.0))]), 0.0, 0.0
    )
    board.routers[1].hear(
        told(now=9.0, requests=[request(1, ("fetch", 1.0, None)), request(2, ("fetch", 1.0, 8.5))]), 0.0, 0.0
    )
    assert [row.name for row in board.rows(0.0)] == ["a#1", "b#1", "b#2", "a#2"]
    assert [round(row.seconds, 3) for row in board.rows(1.0)] == [11.0, 9.0, 7.5, 98.0]
    assert board.row((1, 2), 0.0) is not None
    assert board.row((1, 3), 0.0) is None


def test_more_requests_than_are_told_of_are_counted() -> None:
    board = Board(["http://h:1"])
    board.routers[0].hear(told(requests=[request(1)], under_way=230), 0.0, 0.0)
    assert board.more() == 229


@pytest.mark.parametrize("count", [1, 2, 26, 30])
def test_every_router_has_a_label_of_its_own(count: int) -> None:
    labels = [router.label for router in Board([f"http://h:{n}" for n in range(count)]).routers]
    assert len(set(labels)) == count
    assert (labels[0] == "") is (count == 1)
