"""The summary of a router: its state with the reasons, its numbers, and how it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from embferry.cli.activity.report import as_json, as_lines
from embferry.cli.activity.summary import HEALTHS, RECENT, Expected, no_answer, recent, summary_of, worst
from embferry.cli.activity.words import sentence_of, size, spent, state_of
from embferry.cli.wrapping import columns
from embferry.serve.http import journal
from tests.cli.messages import activity, event, hostile, message, pool, request, told, worker

FIVE = 300.0
KINDS: tuple[str, ...] = journal.EventKind.__args__  # type: ignore[attr-defined]


def state(expected: Expected | None = None, **changes: Any) -> tuple[str, tuple[str, ...]]:
    summary = summary_of(activity(**changes), 400.0, FIVE, expected)
    return summary.health, summary.reasons


def test_a_router_with_all_of_its_workers_is_ready() -> None:
    assert state() == ("ready", ())
    assert state(Expected(1, 1)) == ("ready", ())


def test_what_is_missing_makes_it_not_ready() -> None:
    assert state(missing=["no encode worker has a live lease"]) == ("not_ready", ("no encode worker has a live lease",))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"workers": [worker("encode0", up=False, trouble="it stalls"), worker("language0")]},
         "encode encode0 at http://10.0.0.1:9000/encode0: it stalls"),
        ({"workers": [worker("encode0"), worker("http://h:1", "language", url="http://h:1", up=False)]},
         "language http://h:1: it is not up"),
        ({"pools": [pool("language0", error="status 500")]},
         "the receive pool of language 0 is not known: status 500"),
        ({"events": [event(1, "worker_lost", 200.0, worker="encode1", role="encode")]},
         "1 encode worker is gone, and none has come instead"),
        ({"events": [event(n, "worker_lost", 200.0, worker=f"encode{n}", role="encode") for n in (1, 2)]},
         "2 encode workers are gone, and none has come instead"),
    ],
)  # fmt: skip
def test_a_worker_that_is_unfit_or_gone_degrades_it(changes: dict[str, Any], why: str) -> None:
    assert state(**changes) == ("degraded", (why,))
    assert state(**changes, missing=["m"]) == ("not_ready", ("m", why))


@pytest.mark.parametrize(
    "events",
    [
        [("worker_found", "encode0"), ("worker_lost", "encode1"), ("worker_found", "encode0")],
        [("worker_lost", "encode0"), ("worker_found", "encode0")],
        [("worker_lost", "encode7"), ("worker_lost", "encode8"), ("worker_found", "encode0"), ("worker_found", "e")],
        [("worker_lost", "encode0")],  # it is listed: it has come back, and that event is no longer told
        [("worker_found", "encode0"), ("worker_found", "encode1")],
    ],
)
def test_a_worker_that_was_replaced_is_not_missed(events: list[tuple[str, str]]) -> None:
    told_of = [event(n, kind, 200.0 + n, worker=id, role="encode") for n, (kind, id) in enumerate(events)]
    assert state(events=told_of) == ("ready", ())


@pytest.mark.parametrize(
    "events",
    [
        [("worker_found", "encode1"), ("worker_lost", "encode1")],
        [("worker_lost", "encode2"), ("worker_lost", "encode0"), ("worker_found", "encode0")],
        [("worker_lost", "encode1"), ("worker_found", "language0")],
    ],
)
def test_a_new_worker_takes_the_place_of_one_that_went_before(events: list[tuple[str, str]]) -> None:
    told_of = [
        event(n, kind, 200.0 + n, worker=id, role=id.rstrip("0123456789")) for n, (kind, id) in enumerate(events)
    ]
    assert state(events=told_of)[1] == ("1 encode worker is gone, and none has come instead",)


def test_a_worker_that_went_long_ago_is_forgotten() -> None:
    gone = [event(1, "worker_lost", 99.9, worker="encode1", role="encode")]
    assert state(events=gone) == ("ready", ())


def test_fewer_workers_than_there_must_be() -> None:
    roles = [worker("a", "encode"), worker("b", "prefill"), worker("c", "decode", up=False, trouble="t")]
    assert state(Expected(2, 2), workers=roles, pools=None)[1][1:] == (
        "1 encoder is up, and 2 must be",
        "1 language instance is up, and 2 must be",
    )
    assert state(Expected(1, 1), workers=roles, pools=None)[1] == ("decode c at http://10.0.0.1:9000/c: t",)
    assert state(Expected(1), workers=[], pools=[])[1] == ("0 encoders are up, and 1 must be",)


def test_the_worst_of_several() -> None:
    assert HEALTHS == ("ready", "degraded", "not_ready", "no_answer")
    assert worst(["ready", "not_ready", "degraded"]) == "not_ready"


def test_events_within_the_time_are_counted_by_what_they_mean() -> None:
    events = [event(n, kind, 200.0, count=n + 1) for n, kind in enumerate(KINDS)]
    events.append(event(90, "error", 99.0, count=50))
    counts = recent(activity(events=events), 100.0)
    number = {kind: n + 1 for n, kind in enumerate(KINDS)}
    assert counts == {name: sum(number[kind] for kind in kinds) for name, kinds in RECENT.items()}
    counted = {kind for kinds in RECENT.values() for kind in kinds}
    assert counted == {*KINDS} - {"worker_found", "worker_lost"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_has_a_sentence(kind: str) -> None:
    (one,) = activity(events=[event(1, kind, worker="encode0", code="c", reason="r", count=3)]).events()
    _, title, text = sentence_of(one, activity())
    assert title.partition(" ×")[0] not in ("", kind) or kind == "failover"
    assert text


def test_an_event_of_a_later_version_is_shown_by_its_name() -> None:
    (one,) = activity(events=[event(1, "moved_on", count=2)]).events()
    assert sentence_of(one, activity()) == ("", "moved_on ×2", "")


# In words

BUSY = {
    "requests": [
        request(1, ("fetch", 0.0, 1.0), ("encode", 1.0, None)),
        request(2, ("fetch", 0.0, 1.0), ("encode", 1.0, None)),
        request(3, ("decode", 0.0, None)),
    ],
    "under_way": 5,
    "workers": [worker("encode0", in_flight=2), worker("language0", in_flight=1), worker("language1", in_flight=4)],
    "pools": [pool("language0", num_blocks=1000, used=3), pool("language1", num_blocks=24, used=4, quarantined=2)],
    "events": [event(1, "resumed", count=1200), event(2, "encode_retry"), event(3, "error", count=2),
               event(4, "client_left"), event(5, "worker_failed", count=2)],
    "samples": {"ttft": [[98, 2, 0.5, 0.1, 0.4], [99, 2, 0.3, 0.1, 0.2]], "transfer": []},
}  # fmt: skip


def lines(width: int, **changes: Any) -> list[str]:
    return as_lines("http://h:1", summary_of(activity(**changes), 100.0, FIVE), FIVE, width)


def test_a_busy_router_in_a_few_lines() -> None:
    assert lines(0, **BUSY) == [
        "http://h:1 · ready · shapes · 0.1.0",
        "  encode     1 of 1 up, 2 requests",
        "  language   2 of 2 up, 5 requests, 7 of 1,024 blocks in use, 2 quarantined",
        "  requests   5 under way: 1 decode, 2 encode",
        "  5 min      1,200 resumed transfers, 1 retry, 0 failovers, 2 errors, 2 failed calls, 1 client left",
        "  times      first token 200 ms (most 400 ms)",
    ]


def test_a_router_before_vllm_has_its_roles_and_no_pools() -> None:
    roles = [worker(f"http://h:{n}", role) for n, role in enumerate(["encode", "prefill", "decode"])]
    told_of = lines(0, workers=roles, pools=None, engine="vllm")
    assert [line.split()[0] for line in told_of[1:4]] == ["encode", "prefill", "decode"]
    assert not [line for line in told_of if "block" in line]


def test_a_router_without_workers() -> None:
    told_of = lines(0, workers=[], pools=[], missing=["no encode worker has a live lease", "no language worker has"])
    assert told_of[0] == "http://h:1 · not ready · no model · 0.1.0"
    assert told_of[1:5] == [
        "  why        no encode worker has a live lease",
        "  why        no language worker has",
        "  encode     none",
        "  language   none",
    ]


@pytest.mark.parametrize("width", [20, 39, 40, 60, 80, 200])
def test_lines_fit_the_terminal_and_lose_nothing(width: int) -> None:
    broken = lines(width, **BUSY)
    assert [line for line in broken if columns(line) > width and " " in line.strip()] == []
    words = " ".join(broken).replace(": ", " ").replace(":", "").split()
    assert words == " ".join(lines(0, **BUSY)).replace(": ", " ").replace(":", "").split()


def test_the_state_is_coloured_if_it_may_be() -> None:
    summary = summary_of(activity(missing=["m"]), 100.0, FIVE)
    first = as_lines("http://ready:1", summary, FIVE, 80, colour=True)[0]
    assert first.startswith("http://ready:1 ·\x1b[31m\x1b[1m not ready\x1b[0m ·")
    assert "\x1b" not in "".join(as_lines("http://ready:1", summary, FIVE, 80))


def test_a_router_that_does_not_answer_has_its_reason_alone() -> None:
    assert as_lines("http://h:1", no_answer("no server responds"), FIVE, 0) == [
        "http://h:1 · no answer",
        "  why        no server responds",
    ]
    assert as_json("http://h:1", no_answer("no server responds"), FIVE) == {
        "url": "http://h:1", "state": "no_answer", "reasons": ["no server responds"],
    }  # fmt: skip


def test_json_has_these_fields_for_good() -> None:
    told_of = json.loads(json.dumps(as_json("http://h:1", summary_of(activity(**BUSY), 100.0, FIVE), FIVE)))
    assert told_of == {
        "url": "http://h:1",
        "state": "ready",
        "reasons": [],
        "version": "0.1.0",
        "engine": "embferry",
        "models": ["shapes"],
        "workers": [
            {"id": f"{role}{n}", "role": role, "url": f"http://10.0.0.1:9000/{role}{n}", "up": True, "trouble": ""}
            | {"requests": count}
            for role, n, count in (("encode", 0, 2), ("language", 0, 1), ("language", 1, 4))
        ],
        "requests": {"under_way": 5, "phases": {"encode": 2, "decode": 1}},
        "pools": [
            {"worker": "language0", "blocks": 1000, "used": 3, "quarantined": 0, "error": ""},
            {"worker": "language1", "blocks": 24, "used": 4, "quarantined": 2, "error": ""},
        ],
        "recent": {
            "seconds": FIVE, "resumes": 1200, "retries": 1, "failovers": 0, "fallbacks": 0, "errors": 2,
            "failed_calls": 2, "damaged_messages": 0, "clients_left": 1,
        },
        "times": {
            "ttft": {"count": 4, "mean": 0.2, "highest": 0.4},
            "transfer": {"count": 0, "mean": None, "highest": None},
        },
    }  # fmt: skip
    assert as_json("u", summary_of(activity(pools=None), 100.0, FIVE), FIVE)["pools"] is None


@pytest.mark.parametrize("text", ["\x1b[2J", "[bold red]x[/]", "\u202e", "\x9b1m", "a\nb", ""])
def test_texts_of_a_router_stay_on_their_line(text: str) -> None:
    full = hostile(message(**{**BUSY, "missing": ["x"]}), text) | {"first": True}
    shown = as_lines("http://h:1", summary_of(activity(**full), 100.0, FIVE), FIVE, 60)
    assert not any(ord(letter) < 32 or ord(letter) in (0x9B, 0x202E) for line in shown for letter in line)
    if "bold" in text:
        assert text in "".join(shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 ms"), (0, "0 ms"), (0.0003, "0.30 ms"), (0.0034, "3.4 ms"), (0.12, "120 ms"), (1.239, "1.24 s"),
     (75, "75.0 s"), (1234.5, "1,234 s")],
)  # fmt: skip
def test_a_time_in_words(seconds: float, text: str) -> None:
    assert spent(seconds) == text


def test_sizes_and_states_in_words() -> None:
    assert [size(number) for number in (0, 999, 1500, 150_000, 2e6, 3e15)] == [
        "0 B", "999 B", "1.5 kB", "150 kB", "2.0 MB", "3000 TB",
    ]  # fmt: skip
    transfer = {"tokens": 40, "total_tokens": 64, "transfers": 4}
    (one,) = told(requests=[request(1, ("transfer", 0.0, None), transfer=transfer, attempts=2)]).requests
    assert state_of(one) == "transfer 62 % · 3 resumes · 2 attempts"
    assert state_of(one, short=True) == "transfer 62 % ↻3 ×2"
