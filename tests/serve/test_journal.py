"""The journal of a router: what it keeps, how much of it, and that a reader of changes misses none."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from embferry.cli.activity.state import Activity
from embferry.cli.activity.told import read
from embferry.cli.top.colours import ABOUT, PHASES
from embferry.serve.http import journal as journals
from embferry.serve.http.journal import (
    MAX_ENCODERS,
    MAX_ENDED,
    MAX_EVENTS,
    MAX_PHASES,
    MAX_SHOWN,
    NEVER,
    SAMPLED_SECONDS,
    Journal,
    RequestRecord,
    current_record,
)

CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(tokens: int, total: int = 64, transfers: int = 1) -> dict[str, Any]:
    return {"tokens": tokens, "total_tokens": total, "transfers": transfers, "bytes": total * 8, "transport": "shm"}


class Reader:
    """Keeps what the journal has told, as ``embferry top`` does, and the script of the page."""

    def __init__(self) -> None:
        self.version = NEVER
        self.activity: Activity | None = None

    def read(self, journal: Journal) -> None:
        is_first = self.version == NEVER
        around = {"workers": [], "missing": [], "totals": {}, "router": "", "engine": "", "first": is_first}
        told = read(json.dumps(journal.since(self.version) | around).encode())
        self.version = told.version
        if self.activity is None:
            self.activity = Activity(told, 0.0)
        else:
            self.activity.apply(told, 0.0)

    @property
    def running(self) -> list[int]:
        assert self.activity is not None
        return [record.number for record in self.activity.running()]

    @property
    def kept(self) -> tuple[Any, ...]:
        assert self.activity is not None
        samples = [self.activity.samples(series, 0.0) for series in ("ttft", "transfer")]
        return self.version, self.activity.requests, self.activity.events(), samples, self.running


# Any story of requests


class Story:
    """Calls of a journal, with a clock that goes on at each."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.journal = Journal(self.clock)
        self.records: list[RequestRecord] = []

    def act(self, call: tuple[str, int, float]) -> None:
        name, number, value = call
        self.clock.now += 0.001 + value
        if name == "begin" or not self.records:
            self.records.append(self.journal.begin(CHAT))
            return
        record = self.records[number % len(self.records)]
        calls = {
            "phase": lambda: record.phase(["encode", "transfer", "prefill", "decode", "answer"][number % 5]),  # type: ignore[arg-type]
            "encode": lambda: record.asks("encode", f"encode{number % 20}", beside_others=number % 3 > 0),
            "language": lambda: record.asks("language", f"language{number % 20}"),
            "arrives": lambda: record.arrives(progress(number % 64, transfers=1 + number % 5)),
            "transferred": lambda: record.has_transferred(value, value / 2),
            "again": lambda: record.begins_again("worker_failed", "encode0"),
            "token": lambda: record.first_token(value),
            "fails": lambda: record.fails(f"code{number % 3}"),
            "end": lambda: record.end("answered"),
            "event": lambda: self.journal.event("worker_failed", worker=f"encode{number % 2}"),
        }
        calls[name]()


NAMES = (
    "begin", "phase", "encode", "language", "arrives", "transferred", "again", "token", "fails", "end", "event",
)  # fmt: skip
CALLS = st.tuples(st.sampled_from(NAMES), st.integers(0, 1000), st.floats(0, 50))


@given(st.lists(CALLS, max_size=80))
def test_phases_follow_each_other_without_gaps(calls: list[tuple[str, int, float]]) -> None:
    story = Story()
    for call in calls:
        story.act(call)
    for record in story.records:
        assert record.phases[0][1] == record.began
        for (_, begin, end), (_, follows, _) in zip(record.phases, record.phases[1:], strict=False):
            assert end == follows
            assert begin <= follows
        assert record.phases[-1][2] == record.ended
        assert (record.outcome == "") == (record.ended is None)
        assert len(record.phases) <= MAX_PHASES + 2


@given(st.lists(st.tuples(CALLS, st.booleans()), max_size=80))
def test_a_reader_of_changes_has_the_same_as_one_that_asks_for_everything(
    calls: list[tuple[tuple[str, int, float], bool]],
) -> None:
    story, reader = Story(), Reader()
    for call, reads in calls:
        story.act(call)
        if reads:
            reader.read(story.journal)
    fresh = Reader()
    reader.read(story.journal)
    fresh.read(story.journal)
    assert reader.kept == fresh.kept


def test_a_reader_misses_nothing_when_there_is_more_than_is_kept() -> None:
    story, reader = Story(), Reader()
    records = [story.journal.begin(CHAT) for _ in range(MAX_SHOWN + 100)]
    reader.read(story.journal)
    assert reader.running == [record.number for record in records[:MAX_SHOWN]]
    for record in records[: MAX_SHOWN + 50]:
        story.clock.now += 1
        record.fails(f"code{record.number}")
        story.journal.sample("ttft", 1.0)
        if record.number % 7 == 0:
            reader.read(story.journal)
    fresh = Reader()
    reader.read(story.journal)
    fresh.read(story.journal)
    assert reader.kept == fresh.kept
    assert reader.running == [record.number for record in records[MAX_SHOWN + 50 :]]
    assert len(reader.kept[1]) == MAX_ENDED + 50
    assert story.journal.since(NEVER)["under_way"] == 50


# Bounds


def test_everything_that_is_kept_is_bounded() -> None:
    story = Story()
    record = story.journal.begin(CHAT)
    for number in range(3000):
        story.clock.now += 1
        record.phase("encode" if number % 2 else "transfer")
        record.asks("encode", f"encode{number}" * 100, beside_others=True)
        story.journal.event("worker_failed", worker=f"w{number}", reason="x" * 10_000)
        story.journal.sample("ttft", 1.0)
        story.journal.begin(CHAT).end("answered")
    told = story.journal.since(NEVER)
    assert len(told["requests"]) == MAX_ENDED + 1
    assert len(told["events"]) == MAX_EVENTS
    assert len(told["samples"]["ttft"]) == SAMPLED_SECONDS
    view = record.view()
    assert len(view["phases"]) == MAX_PHASES
    assert len(view["encoders"]) == MAX_ENCODERS
    assert len(json.dumps(told)) < 200_000


def test_the_same_event_again_is_one_with_a_count() -> None:
    story = Story()
    first, second = story.journal.begin(CHAT), story.journal.begin(CHAT)
    first.fails("no_worker")
    second.fails("no_worker")
    story.journal.event("worker_lost", worker="encode0")
    told = story.journal.since(NEVER)["events"]
    assert [(one["kind"], one["count"], one["request"]) for one in told] == [("error", 2, 2), ("worker_lost", 1, None)]


def test_resumed_transfers_of_a_request_are_one_event_that_counts_them() -> None:
    story = Story()
    record, other = story.journal.begin(CHAT), story.journal.begin(CHAT)
    for one in (record, other):
        one.phase("encode")
        one.asks("language", "language0")
    record.arrives(progress(8, transfers=1))
    record.arrives(progress(16, transfers=3))
    other.arrives(progress(16, transfers=2))
    record.arrives(progress(64, transfers=8))
    told = story.journal.since(NEVER)["events"]
    assert [(one["request"], one["count"], one["worker"]) for one in told] == [(1, 7, "language0"), (2, 1, "language0")]


# Times


def test_the_phases_of_a_request_before_our_workers() -> None:
    story = Story()
    record = story.journal.begin(CHAT)
    for seconds, call in (
        (1.0, lambda: record.phase("encode")),
        (3.0, lambda: record.arrives(progress(32))),
        (2.0, lambda: record.arrives(progress(64))),
        (0.0, lambda: record.has_transferred(2.5, 0.5)),
        (1.0, lambda: record.first_token(7.0)),
        (4.0, lambda: record.end("answered")),
    ):
        story.clock.now += seconds
        call()
    assert record.view()["phases"] == [
        ("fetch", 0.0, 1.0), ("encode", 1.0, 3.0), ("transfer", 3.0, 5.5), ("prefill", 5.5, 7.0), ("decode", 7.0, 11.0),
    ]  # fmt: skip
    samples = story.journal.since(NEVER)["samples"]
    assert samples == {"transfer": [(6, 1, 2.5, 2.5, 2.5)], "ttft": [(7, 1, 7.0, 7.0, 7.0)]}


def test_progress_that_comes_late_begins_no_phase_again() -> None:
    story = Story()
    record = story.journal.begin(CHAT)
    record.phase("encode")
    record.first_token(1.0)
    record.arrives(progress(64))
    record.has_transferred(1.0, 0.0)
    assert [name for name, _, _ in record.phases] == ["fetch", "encode", "decode"]


def test_nothing_changes_after_the_end() -> None:
    story = Story()
    record = story.journal.begin(CHAT)
    record.end("answered")
    story.clock.now += 1
    before = record.view()
    record.end("client left")
    record.fails("no_worker")
    record.phase("decode")
    record.asks("language", "language0")
    record.describe(streams=True, kinds=["image"])
    record.arrives(progress(8, transfers=2))
    record.begins_again("worker_failed", "encode0")
    assert record.view() == before
    assert not story.journal.since(NEVER)["events"]


def test_a_worker_is_asked_in_place_of_the_one_before_or_beside_it() -> None:
    record = Story().journal.begin(CHAT)
    for worker in ("a", "b"):
        record.asks("encode", worker)
        record.asks("language", worker)
    assert (record.encoders, record.language) == (["b"], "b")
    for worker in ("b", "c"):
        record.asks("encode", worker, beside_others=True)
    assert record.encoders == ["b", "c"]


# The request that code runs for


def test_code_finds_the_record_of_its_request() -> None:
    journal = Journal(Clock())
    with journal.request(CHAT) as record:
        assert current_record() is record
        journal.event("fallback")
        record.end("answered")
    assert current_record() is not record
    current_record().phase("decode")  # of none: it is not kept
    assert [one["number"] for one in journal.since(NEVER)["requests"]] == [1]
    assert journal.since(NEVER)["events"][0]["request"] == 1


def test_a_bug_is_an_error_of_the_request() -> None:
    journal = Journal(Clock())
    with pytest.raises(KeyError), journal.request(CHAT):
        raise KeyError
    assert journal.since(NEVER)["requests"][0]["outcome"] == "internal_error"


def test_the_script_of_the_page_keeps_as_much(pytestconfig: pytest.Config) -> None:
    script = (pytestconfig.rootpath / "src/embferry/serve/page/page.js").read_text()
    assert f"const ENDED = {MAX_ENDED}, EVENTS = {MAX_EVENTS}, SECONDS = {SAMPLED_SECONDS};" in script
    for phase in journals.Phase.__args__:  # type: ignore[attr-defined]
        assert f"\n  {phase}: " in script
    for kind in journals.EventKind.__args__:  # type: ignore[attr-defined]
        assert f"\n  {kind}: " in script


def test_the_terminal_knows_every_phase() -> None:
    assert list(PHASES) == list(ABOUT) == list(journals.Phase.__args__)  # type: ignore[attr-defined]
