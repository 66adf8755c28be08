"""Every state has a time-out, and says what it waited for."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Revoke
from embferry.protocol.errors import EmbeddingTransferError, LeaseExpired, PeerGone
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import Phase

from .builders import (
    ENCODE,
    LANGUAGE,
    ROOM,
    a_grant,
    an_offer,
    an_open,
    new_receiver,
    new_sender,
    offered,
    opened,
    sent_messages,
    to_receiver,
    to_sender,
)


def run_out(receiver: Receiver, *, silent: bool) -> tuple[float, EmbeddingTransferError]:
    """Time passes, with a sign of life whenever something is asked, or without."""
    now = 0.0
    while receiver.error is None:
        now = receiver.next_timeout() or 1e9
        receiver.expire(now)
        assert (receiver.next_timeout() or 1e9) > now
        if sent_messages(receiver) and not silent:
            for grant in receiver.ledger.active or [None]:
                epoch = 0 if grant is None else grant.epoch
                to_receiver(receiver, m.Pending(ROOM, epoch), now, source=receiver.peer)
    return now, receiver.error


@pytest.mark.parametrize(
    ("phase", "silent", "after", "kind", "why"),
    [
        (Phase.BOOTSTRAPPING, True, 30.0, PeerGone, "no encode worker has answered for 30 s"),
        (Phase.WAITING_FOR_INPUT, True, 10.0, PeerGone, "has been silent for 10 s at token 0"),
        (Phase.WAITING_FOR_INPUT, False, 120.0, LeaseExpired, "has produced nothing for 120 s"),
        (Phase.TRANSFERRING, True, 10.0, PeerGone, "has been silent for 10 s at token 4"),
        (Phase.TRANSFERRING, False, 30.0, LeaseExpired, "no token has arrived for 30 s after the first 4"),
        (Phase.RESUMING, True, 10.0, PeerGone, "lost at token 4"),
    ],
)
def test_every_state_of_a_receiver_ends(
    phase: Phase, silent: bool, after: float, kind: type[EmbeddingTransferError], why: str
) -> None:
    receiver = new_receiver()
    if phase is not Phase.BOOTSTRAPPING:
        to_receiver(receiver, an_offer(8))
        receiver.grant((0, 1), 1, 0.0)
    if phase in (Phase.TRANSFERRING, Phase.RESUMING):
        to_receiver(receiver, m.Written(ROOM, 1, (m.Chunk(0, 4, b"checksum"),)))
        receiver.verified_chunk(1, 0, matches=True, now=0.0)
    if phase is Phase.RESUMING:
        receiver.peer_lost(0.0)
    receiver.take_commands()
    assert receiver.phase is phase
    now, error = run_out(receiver, silent=silent)
    assert (now, type(error), error.room, error.retryable) == (after, kind, ROOM, True)
    assert why in error.detail


def test_a_length_that_never_comes_is_not_waited_for_for_ever() -> None:
    receiver = offered(-1)
    now, error = run_out(receiver, silent=False)
    assert (now, type(error)) == (120.0, LeaseExpired)


def test_waiting_for_blocks_is_nobodys_fault() -> None:
    receiver = offered(8)
    for now in range(1, 500):
        receiver.expire(float(now))
    assert receiver.error is None
    assert m.Progress(ROOM, 0, 1) in sent_messages(receiver)  # a sign of life, lest the sender give up
    receiver.grant((0, 1), 1, 500.0)
    receiver.expire(509.0)
    assert receiver.error is None
    receiver.expire(510.0)
    assert isinstance(receiver.error, PeerGone)


def test_a_peer_lost_late_leaves_time_to_find_another() -> None:
    receiver = offered(8)
    receiver.peer_lost(100.0)
    receiver.expire(129.0)
    assert receiver.error is None


def test_questions_are_repeated_less_and_less_often_until_they_are_answered() -> None:
    receiver = new_receiver()
    sent_messages(receiver)
    times = []
    while receiver.error is None:
        now = receiver.next_timeout() or 1e9
        receiver.expire(now)
        times += [round(now, 3) for body in sent_messages(receiver) if isinstance(body, m.Open)]
    assert times[:6] == [0.1, 0.3, 0.7, 1.5, 2.5, 3.5]


def test_what_is_not_answered_is_asked_again() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    grant = sent_messages(receiver)[-1]
    receiver.expire(0.1)
    assert sent_messages(receiver) == [grant]
    receiver.expire(0.2)
    assert sent_messages(receiver) == []  # not yet
    to_receiver(receiver, an_offer(-1))
    receiver.expire(0.31)
    assert sent_messages(receiver) == [grant]


def test_a_drain_that_is_not_answered_becomes_a_revocation() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    to_receiver(receiver, an_offer(8, digest=b"another"))
    receiver.take_commands()
    receiver.expire(1.9)
    assert m.Drain(ROOM, (1,)) in sent_messages(receiver)
    receiver.expire(2.0)
    assert Revoke(1) in receiver.take_commands()
    receiver.expire(2.1)
    receiver.peer_lost(2.2)
    assert Revoke(1) not in receiver.take_commands()  # once is enough


def test_an_end_that_nobody_acknowledges_is_repeated_for_a_while() -> None:
    receiver = offered(0)
    now, confirms = 0.0, 0
    while (due := receiver.next_timeout()) is not None:
        now = due
        confirms += sum(isinstance(body, m.Confirm) for body in sent_messages(receiver))
        receiver.expire(now)
    assert confirms > 3
    assert 4.0 < now < 5.0
    assert (receiver.settled(4.9), receiver.settled(5.0)) == (receiver.next_timeout() is None, True)


def test_a_sender_that_nobody_opens_gives_up() -> None:
    sender = new_sender(total=8)
    to_sender(sender, an_open(versions=(2, 2)), 20.0, target=0)  # who cannot be served does not count
    assert sender.next_timeout() == 30.0
    sender.expire(29.9)
    assert sender.error is None
    sender.expire(30.0)
    assert isinstance(sender.error, LeaseExpired)
    assert "no language worker has opened the transfer for 30 s" in sender.error.detail
    assert sender.settled(35.0)


def test_a_sender_whose_receiver_falls_silent_gives_up_and_says_so() -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)), 5.0)
    to_sender(sender, m.Progress(ROOM, 0, 1), 10.0, source=ENCODE + 5)  # a stranger
    assert sender.next_timeout() == 65.0
    sender.take_commands()
    sender.expire(65.0)
    assert isinstance(sender.error, LeaseExpired)
    assert [type(body) for body in sent_messages(sender)] == [m.Abort]
    assert LANGUAGE in sender.destinations
