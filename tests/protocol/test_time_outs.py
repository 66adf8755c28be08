"""Every state has a time-out, and its error names the cause."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Revoke
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LeaseExpired, PeerGone
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
    """Advances the time until the receiver fails.

    Args:
        receiver: The receiver.
        silent: Whether the peer is silent; otherwise it answers every request with ``Pending``.

    Returns:
        The time of the failure, and the error.
    """
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


def test_bytes_that_come_in_slowly_are_progress() -> None:
    """But not under a grant that is being drained or that is unknown."""
    receiver = new_receiver()
    to_receiver(receiver, an_offer(8))
    receiver.grant((0, 1), 1, 0.0)
    receiver.receiving(1, 100.0)
    receiver.receiving(99, 200.0)
    assert run_out(receiver, silent=False)[0] == 220.0
    receiver.receiving(1, 300.0)
    assert receiver.progress_at == 100.0


def test_the_first_offer_may_take_longer_than_later_ones() -> None:
    """The encoder may have other items first. A peer that does not answer is lost as soon as ever."""
    assert run_out(new_receiver(offer_timeout=600.0), silent=False)[0] == 600.0
    assert run_out(new_receiver(offer_timeout=600.0), silent=True)[0] == 5.0
    redirected = new_receiver(offer_timeout=600.0)
    redirected.redirected(0.0)
    assert run_out(redirected, silent=False)[0] == 30.0
    offered_once = new_receiver(offer_timeout=600.0)
    to_receiver(offered_once, an_offer(8))
    offered_once.peer_lost(0.0)
    assert run_out(offered_once, silent=False)[0] == 30.0


@pytest.mark.parametrize(
    ("phase", "silent", "after", "kind", "why"),
    [
        (Phase.BOOTSTRAPPING, True, 5.0, PeerGone, "not answered for 5 s"),
        (Phase.BOOTSTRAPPING, False, 30.0, PeerGone, "not opened the room for 30 s"),
        (Phase.WAITING_FOR_INPUT, True, 5.0, PeerGone, "silent for 5 s at token 0"),
        (Phase.WAITING_FOR_INPUT, False, 120.0, LeaseExpired, "120 s"),
        (Phase.TRANSFERRING, True, 5.0, PeerGone, "silent for 5 s at token 4"),
        (Phase.TRANSFERRING, False, 30.0, LeaseExpired, "30 s"),
        (Phase.RESUMING, True, 5.0, PeerGone, "token 4"),
        (Phase.RESUMING, False, 30.0, PeerGone, "not opened the room for 30 s"),
    ],
)
def test_every_waiting_state_of_a_receiver_times_out(
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


@pytest.mark.parametrize("silence", [0.05, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_peer_that_answers_each_request_is_never_silent_for_too_long(silence: float, is_open: bool) -> None:
    """It has nothing else to say, because its encoder runs."""
    receiver = new_receiver(answer_timeout=silence, peer_timeout=silence)
    if is_open:
        to_receiver(receiver, an_offer(8))
        receiver.grant((0, 1), 1, 0.0)
    now, error = run_out(receiver, silent=False)
    assert "silent" not in error.detail
    assert "not answered" not in error.detail
    assert now == (120.0 if is_open else 30.0)


def test_the_wait_for_the_length_times_out() -> None:
    receiver = offered(-1)
    now, error = run_out(receiver, silent=False)
    assert (now, type(error)) == (120.0, LeaseExpired)


def test_waiting_for_blocks_does_not_time_out() -> None:
    receiver = offered(8)
    for now in range(1, 500):
        receiver.expire(float(now))
    assert receiver.error is None
    assert m.Progress(ROOM, 0, 1) in sent_messages(receiver)  # keeps the sender's lease alive
    receiver.grant((0, 1), 1, 500.0)
    receiver.expire(504.9)
    assert receiver.error is None
    receiver.expire(505.0)
    assert isinstance(receiver.error, PeerGone)


def test_the_time_to_find_another_peer_begins_with_the_loss() -> None:
    receiver = offered(8)
    receiver.peer_lost(100.0)
    receiver.expire(104.9)
    assert receiver.error is None
    receiver.expire(105.0)
    assert isinstance(receiver.error, PeerGone)


@pytest.mark.parametrize("body", [m.Pending(ROOM, 1), m.Pending(ROOM + 1, 0), m.Drained(ROOM, (1,)), m.Closed(ROOM)])
def test_only_a_pending_without_a_grant_is_a_sign_of_life_of_a_worker_that_has_no_sender_yet(body: m.Body) -> None:
    receiver = new_receiver()
    to_receiver(receiver, m.Pending(ROOM, 0), 3.0, source=0)
    receiver.expire(7.9)
    assert (receiver.error, receiver.peer, receiver.phase) == (None, 0, Phase.BOOTSTRAPPING)
    if body.room == ROOM:  # the driver finds the receiver of another room
        to_receiver(receiver, body, 7.9, source=0)
    receiver.expire(8.0)
    assert isinstance(receiver.error, PeerGone)


def test_a_sign_of_life_does_not_end_the_wait_for_another_peer() -> None:
    receiver = new_receiver()
    receiver.failover.timeout = 5.0
    receiver.expire(5.0)
    lost = receiver.failover.lost
    assert lost is not None
    to_receiver(receiver, m.Pending(ROOM, 0), 6.0, source=0)
    receiver.expire(10.0)
    assert receiver.error is lost


def test_the_interval_between_retransmissions_doubles_up_to_its_limit() -> None:
    receiver = new_receiver()
    sent_messages(receiver)
    times = []
    while receiver.error is None:
        now = receiver.next_timeout() or 1e9
        receiver.expire(now)
        times += [round(now, 3) for body in sent_messages(receiver) if isinstance(body, m.Open)]
    assert times[:6] == [0.1, 0.3, 0.7, 1.5, 2.5, 3.5]


def test_an_unanswered_grant_is_retransmitted() -> None:
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


def test_an_unanswered_drain_becomes_a_revocation() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    receiver.abort(Aborted("asked for", room=ROOM), 0.0)
    receiver.take_commands()
    receiver.expire(1.9)
    assert m.Drain(ROOM, (1,)) in sent_messages(receiver)
    receiver.expire(2.0)
    assert Revoke(1) in receiver.take_commands()
    receiver.expire(2.1)
    receiver.peer_lost(2.2)
    assert Revoke(1) not in receiver.take_commands()  # it is revoked once


def test_an_unacknowledged_confirm_is_repeated_while_the_receiver_lingers() -> None:
    receiver = offered(0)
    now, confirms = 0.0, 0
    while (due := receiver.next_timeout()) is not None:
        now = due
        confirms += sum(isinstance(body, m.Confirm) for body in sent_messages(receiver))
        receiver.expire(now)
    assert confirms > 3
    assert 4.0 < now < 5.0
    assert (receiver.settled(4.9), receiver.settled(5.0)) == (receiver.next_timeout() is None, True)


def test_a_sender_that_is_never_opened_times_out() -> None:
    sender = new_sender(total=8)
    to_sender(sender, an_open(versions=(2, 2)), 20.0, target=0)  # an incompatible receiver does not count
    assert sender.next_timeout() == 30.0
    sender.expire(29.9)
    assert sender.error is None
    sender.expire(30.0)
    assert isinstance(sender.error, LeaseExpired)
    assert "30 s" in sender.error.detail
    assert sender.settled(35.0)


def test_a_sender_with_a_silent_receiver_times_out_and_sends_an_abort() -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)), 5.0)
    to_sender(sender, m.Progress(ROOM, 0, 1), 10.0, source=ENCODE + 5)  # from a foreign session
    assert sender.next_timeout() == 65.0
    sender.take_commands()
    sender.expire(65.0)
    assert isinstance(sender.error, LeaseExpired)
    assert [type(body) for body in sent_messages(sender)] == [m.Abort]
    assert LANGUAGE in sender.destinations
