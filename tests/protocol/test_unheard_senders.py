"""A receiver that ends before it has heard its sender tells it all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Send
from embferry.protocol.errors import Aborted, LeaseExpired
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import Phase

from .builders import (
    LANGUAGE,
    ROOM,
    an_offer,
    an_open,
    new_receiver,
    new_sender,
    offered,
    sent_messages,
    to_receiver,
    to_sender,
)

ABORT = m.Abort(ROOM, "aborted", "asked for")
OTHER = LANGUAGE + 1


def aborts(receiver: Receiver) -> list[int]:
    """Takes the commands, and returns the sessions to which an abort is sent; 0: to the sender of the room."""
    return [c.target for c in receiver.take_commands() if isinstance(c, Send) and isinstance(c.body, m.Abort)]


ENDS: dict[str, Callable[[Receiver], None]] = {
    "aborted": lambda receiver: receiver.abort(Aborted("asked for"), 0.1),
    "cleared": lambda receiver: receiver.clear(0.1),
    "timed out": lambda receiver: receiver.expire(receiver.settings.answer_timeout),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_receiver_that_has_heard_no_sender_tells_it_until_it_is_answered(end: str) -> None:
    receiver = new_receiver()
    receiver.take_commands()
    ENDS[end](receiver)
    ended = receiver.ended_at
    assert aborts(receiver) == [0]
    receiver.expire(ended + 0.1)
    assert aborts(receiver) == [0]  # it may have been lost, or the room is not open yet
    to_receiver(receiver, m.Unknown(ROOM, 0), ended + 0.2)
    assert not receiver.settled(ended + 0.2)
    to_receiver(receiver, m.Closed(ROOM), ended + 0.2)
    assert receiver.settled(ended + 0.2)
    receiver.expire(ended + 1.0)
    assert aborts(receiver) == []


def test_it_stops_when_it_has_lingered() -> None:
    receiver = new_receiver()
    receiver.abort(Aborted("asked for"), 0.0)
    receiver.expire(receiver.settings.linger)
    assert receiver.settled(receiver.settings.linger)


def test_a_receiver_that_has_lost_its_sender_tells_whoever_serves_the_room() -> None:
    receiver = offered(8)
    receiver.peer_lost(1.0)
    receiver.abort(Aborted("asked for"), 1.0)
    assert aborts(receiver) == [0]
    to_receiver(receiver, an_offer(8, generation=2), 1.1)
    assert aborts(receiver) == [200]


def test_a_sender_without_a_receiver_ends_with_the_error() -> None:
    sender = new_sender(total=8)
    to_sender(sender, ABORT, target=0)
    assert sender.phase is Phase.FAILED
    assert isinstance(sender.error, Aborted)
    assert sent_messages(sender) == [m.Closed(ROOM)]
    to_sender(sender, ABORT, target=0)
    assert sent_messages(sender) == [m.Closed(ROOM)]


def test_a_sender_ends_with_the_receiver_that_it_serves_and_with_no_other() -> None:
    sender = new_sender(total=8)
    to_sender(sender, an_open(), target=0)
    to_sender(sender, an_open(), source=OTHER, target=0)
    sent_messages(sender)
    for source in (LANGUAGE, 7):  # one that was replaced, and one that was never heard
        to_sender(sender, ABORT, source=source, target=0)
        assert sender.phase is Phase.WAITING_FOR_INPUT
        assert sent_messages(sender) == [m.Closed(ROOM)]
    to_sender(sender, ABORT, source=OTHER, target=0)
    assert sender.phase is Phase.FAILED


def test_the_lease_of_the_receiver_that_is_served_is_not_renewed_by_another() -> None:
    sender = new_sender(total=8)
    to_sender(sender, an_open(), 0.0, target=0)
    to_sender(sender, ABORT, 50.0, source=7, target=0)
    sender.expire(sender.settings.lease_timeout)
    assert isinstance(sender.error, LeaseExpired)
