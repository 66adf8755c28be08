"""Bounds on the memory that a receiver can make a sender use."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol import validation
from embferry.protocol.layout import Geometry

from .builders import (
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
