"""Bounds on the memory that a receiver can make a sender use."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol import validation
from embferry.protocol.commands import Write
from embferry.protocol.errors import CapacityError, TransportError
from embferry.protocol.layout import Geometry

from .builders import (
    CHECKSUM,
    GEOMETRY,
    LANGUAGE,
    ROOM,
    a_grant,
    an_open,
    new_sender,
    opened,
    other_commands,
    sent_messages,
    to_sender,
)
from .test_sender import finish, written


def test_the_number_of_receivers_is_bounded() -> None:
    sender = new_sender()
    for session in range(validation.MAX_RECEIVERS + 1):
        to_sender(sender, an_open(), source=1000 + session, target=0)
    assert [body.code for body in sent_messages(sender) if isinstance(body, m.Abort)] == ["capacity_exhausted"]


def test_the_memory_that_a_receiver_can_claim_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.protocol.destination.MAX_GRANTS", 2)
    sender = opened(16)
    to_sender(sender, m.Drain(ROOM, (10, 11, 12, 11)))
    assert sent_messages(sender) == [m.Drained(ROOM, (10, 11, 11))]
    to_sender(sender, m.Drain(ROOM, (13,)))
    assert sent_messages(sender) == []
    for epoch in (1, 2, 3):
        to_sender(sender, a_grant(epoch, 4 * epoch, 4, (epoch, 1)))
    assert {write.epoch for write in other_commands(sender)} == {1, 2}


SCATTERED = tuple((block, 1) for block in range(0, 2 * m.MAX_RUNS, 2))


def test_the_runs_that_a_receiver_can_make_a_sender_remember_are_bounded() -> None:
    sender = new_sender(total=1 << 30)
    to_sender(sender, an_open(geometry=Geometry(GEOMETRY.layout, 1 << 20, 4)), target=0)
    destination, runs = sender.destinations[LANGUAGE], len(SCATTERED)
    for epoch in range(1, 100):
        to_sender(sender, a_grant(epoch, epoch * runs * 4, runs * 4, *SCATTERED))
    assert destination.open_runs == sum(len(t.runs) for t in destination.grants.values()) == validation.MAX_OPEN_RUNS
    assert len(destination.grants) == validation.MAX_OPEN_RUNS // runs
    to_sender(sender, m.Drain(ROOM, (1,)))  # a grant that is over makes room for another
    to_sender(sender, a_grant(100, 0, runs * 4, *SCATTERED))
    assert 100 in destination.grants
    to_sender(sender, an_open(2, geometry=Geometry(GEOMETRY.layout, 1 << 20, 4)), target=0)
    assert destination.open_runs == 0


def test_the_blocks_of_a_receiver_that_was_replaced_are_forgotten() -> None:
    sender = opened(16, ready=0)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    to_sender(sender, an_open(), source=LANGUAGE + 1, target=0)
    assert sender.destinations[LANGUAGE].open_runs == 0
    sender.take_commands()
    sender.produce(16)
    assert other_commands(sender) == []


def test_a_grant_that_is_written_keeps_its_reports_but_not_its_blocks() -> None:
    sender = opened(6)
    to_sender(sender, a_grant(1, 0, 8, (0, 1), (2, 1)))  # beyond the length
    destination = sender.destinations[LANGUAGE]
    assert (destination.open_runs, len(destination.unfinished)) == (0, 0)
    for write in other_commands(sender):
        finish(sender, write)
    sender.take_commands()
    to_sender(sender, a_grant(1, 0, 8, (0, 1), (2, 1)))
    assert sent_messages(sender) == [written(1, (0, 4), (4, 2))]


def test_the_reports_that_a_receiver_can_make_a_sender_keep_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that requests the same tokens again and again, and closes no grant."""
    monkeypatch.setattr("embferry.protocol.destination.MAX_REPORTS", 10)
    sender = opened(16)
    destination = sender.destinations[LANGUAGE]
    for epoch in range(1, 20):
        to_sender(sender, a_grant(epoch, 0, 16, (0, 4)))
        while writes := [command for command in other_commands(sender) if isinstance(command, Write)]:
            for number, write in enumerate(writes):
                if number % 2:
                    finish(sender, write)
                else:
                    sender.write_failed(LANGUAGE, write.epoch, write.offset, write.length, TransportError("broken"))
        kept = sum(len(taken.written) + len(taken.failed) for taken in destination.grants.values())
        assert kept == destination.reports <= 10
    assert isinstance(sender.error, CapacityError)
    assert "closes none of its grants" in sender.error.detail
    assert not sender.error.retryable


def test_a_receiver_that_closes_its_grants_is_served_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.protocol.destination.MAX_REPORTS", 10)
    sender = opened(16)
    for epoch in range(1, 50):
        to_sender(sender, a_grant(epoch, 0, 16, (0, 4), floor=epoch))
        while writes := other_commands(sender):
            for write in writes:
                finish(sender, write)
    assert sender.error is None
    assert sender.destinations[LANGUAGE].reports == 4


@pytest.mark.parametrize("how", ["another generation", "replaced", "drained", "closed"])
def test_what_is_kept_of_grants_that_are_over_is_forgotten(how: str) -> None:
    sender = opened(16)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    finish(sender, other_commands(sender)[0])  # the other write stays in flight
    to_sender(sender, m.Drain(ROOM, (5,)))
    destination = sender.destinations[LANGUAGE]
    assert (destination.reports, destination.refused) == (1, {5})
    if how == "another generation":
        to_sender(sender, an_open(2), target=0)
    elif how == "replaced":
        to_sender(sender, an_open(), source=LANGUAGE + 1, target=0)
    elif how == "drained":
        to_sender(sender, m.Drain(ROOM, (1,)))
    else:
        to_sender(sender, m.Progress(ROOM, 8, 2))
    assert (destination.reports, set(destination.grants)) == (0, {1})
    if how in ("another generation", "replaced"):
        assert destination.refused == set()
        sender.take_commands()
        to_sender(sender, a_grant(5, 0, 4, (3, 1)))  # late: it was drained
        assert other_commands(sender) == []
    sender.write_done(LANGUAGE, 1, 4, 4, CHECKSUM)
    if how != "drained":
        assert destination.grants == {}
    assert destination.reports == 0


def test_a_grant_that_is_late_for_a_new_generation_is_not_written() -> None:
    sender = opened(16)
    to_sender(sender, a_grant(3, 0, 4, (0, 1)))
    to_sender(sender, an_open(2), target=0)
    sender.take_commands()
    to_sender(sender, a_grant(2, 4, 4, (1, 1)))  # made before the third, so it is revoked as well
    assert other_commands(sender) == []
    to_sender(sender, a_grant(4, 4, 4, (2, 1)))
    assert [write.epoch for write in other_commands(sender)] == [4]
