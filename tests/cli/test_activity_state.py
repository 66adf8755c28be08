"""The state that a reader of the stream keeps, beside what ``tests/serve/test_journal.py`` shows for any story."""

from __future__ import annotations

from embferry.cli.activity.state import Activity
from embferry.serve.http.journal import MAX_EVENTS, MAX_SHOWN
from tests.cli.messages import activity, event, message, request, told, worker


def numbers(known: Activity) -> list[int]:
    return sorted(known.requests)


def test_the_first_message_of_a_stream_replaces_everything() -> None:
    known = activity(requests=[request(7)], events=[event(9, "error")], samples={"ttft": [[99, 1, 1.0, 1.0, 1.0]]})
    known.apply(told(requests=[request(1)], now=3.0), 50.0)
    assert numbers(known) == [1]
    assert (known.events(), known.samples("ttft", 0.0)) == ([], [])
    assert known.now(50.5) == 3.5


def test_later_messages_have_only_what_has_changed() -> None:
    known = activity(requests=[request(1), request(2)], events=[event(1, "error", count=1)])
    later = message(requests=[request(2, ("fetch", 0.0, 1.0))], running=[1], events=[event(1, "error", count=3)])
    known.apply(told(**later | {"first": False}), 1.0)
    assert [one.number for one in known.running()] == [1]
    assert [one.number for one in known.ended()] == [2]
    assert [one.count for one in known.events()] == [3]


def test_time_stands_still_while_the_router_is_gone() -> None:
    known = activity(now=100.0)
    assert known.now(5.0) == 105.0
    known.stop(5.0)
    known.stop(9.0)
    assert known.now(60.0) == 105.0
    known.apply(told(now=2.0), 70.0)
    assert known.now(71.0) == 3.0


def test_no_more_is_kept_than_a_router_tells() -> None:
    requests = [request(number) for number in range(MAX_SHOWN + 50)]
    known = activity(requests=requests, events=[event(n, "error") for n in range(MAX_EVENTS + 50)])
    assert len(known.requests) == MAX_SHOWN
    assert len(known.events()) == MAX_EVENTS


def test_a_worker_is_named_by_its_role_and_place_and_by_its_id_once_it_is_gone() -> None:
    known = activity(workers=[worker("x", "language"), worker("y", "encode"), worker("z", "language")])
    assert [known.name(id) for id in ("x", "y", "z", "w", "")] == ["language 0", "encode 0", "language 1", "w", ""]
