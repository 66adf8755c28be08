"""A receiver with failover: after a loss it keeps its tokens and waits for another peer."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Restart, Revoke
from embferry.protocol.errors import BY_CODE, IntegrityError, LeaseExpired, PeerGone, RemoteProtocolError
from embferry.protocol.failover import CAUSED_BY_PEER
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll, Phase

from .builders import (
    AT_ONCE,
    ENCODE,
    GEOMETRY,
    LANGUAGE,
    ROOM,
    TRANSPORTS,
    an_offer,
    report_chunk,
    sent_messages,
    to_receiver,
    written,
)

OTHER = ENCODE + 1
WAIT = 5.0


def new_receiver(timeout: float | None = WAIT, **settings: float) -> Receiver:
    given = TransferSettings(**{**AT_ONCE, "peer_timeout": 1.0, "bootstrap_timeout": 1.0, **settings})
    return Receiver(ROOM, LANGUAGE, GEOMETRY, "language", TRANSPORTS, given, 0.0, timeout)


def half(timeout: float | None = WAIT, **settings: float) -> Receiver:
    """Returns a receiver with 4 of 12 tokens transferred and the rest granted."""
    receiver = new_receiver(timeout, **settings)
    to_receiver(receiver, an_offer(12))
    receiver.grant((0, 1, 2), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    receiver.take_commands()
    return receiver


def finish(receiver: Receiver, now: float, start: int) -> None:
    """Transfers the tokens from ``start`` on from the other peer."""
    assert receiver.wanted(now) == (start, 12 - start)
    receiver.grant(tuple(range(3, 3 + (12 - start) // 4)), 2, now)
    for offset in range(start, 12, 4):
        to_receiver(receiver, written(2, offset, 4), now, OTHER)
        receiver.verified_chunk(2, offset, matches=True, now=now)


@pytest.mark.parametrize("body", [an_offer(12, generation=2), m.Abort(ROOM, "aborted", "asked for", 2)])
def test_a_message_is_ignored_while_no_peer_is_named(body: m.Body) -> None:
    """Its sender guesses the generation of an ``open`` that has not been sent."""
    receiver = half()
    receiver.expire(1.0)
    assert receiver.generation == 2
    to_receiver(receiver, body, 1.0, OTHER)
    assert (receiver.peer, receiver.phase, receiver.error) == (0, Phase.RESUMING, None)
    receiver.redirected(1.0)
    assert receiver.generation == 3
    to_receiver(receiver, an_offer(12, generation=3), 1.0, OTHER)
    assert receiver.peer == OTHER


def test_a_silent_peer_is_revoked_and_no_message_follows() -> None:
    receiver = half()
    receiver.expire(1.0)
    assert (receiver.phase, receiver.error) == (Phase.RESUMING, None)
    assert isinstance(receiver.failover.lost, PeerGone)
    commands = receiver.take_commands()
    assert Revoke(1) in commands
    receiver.expire(3.0)
    assert sent_messages(receiver) == []


def test_another_peer_resumes_at_the_first_missing_token() -> None:
    receiver = half()
    receiver.expire(1.0)
    receiver.take_commands()
    receiver.redirected(2.0)
    assert receiver.failover.lost is None
    (asked,) = sent_messages(receiver)
    assert isinstance(asked, m.Open)
    assert asked.transferred_tokens == 4
    to_receiver(receiver, an_offer(12, generation=asked.generation), 2.0, OTHER)
    finish(receiver, 2.0, start=4)
    assert receiver.poll() is KVPoll.Success


def test_another_content_restarts_at_the_first_token() -> None:
    receiver = half()
    receiver.expire(1.0)
    receiver.redirected(2.0)
    receiver.take_commands()
    to_receiver(receiver, an_offer(12, generation=receiver.generation, digest=b"another"), 2.0, OTHER)
    assert Restart() in receiver.take_commands()
    finish(receiver, 2.0, start=0)
    assert receiver.content_digest == b"another"
    assert receiver.poll() is KVPoll.Success


def test_messages_of_a_lost_peer_are_ignored() -> None:
    receiver = half()
    receiver.expire(1.0)
    to_receiver(receiver, an_offer(12), 1.5)
    to_receiver(receiver, m.Abort(ROOM, "lease_expired", "late", 1), 1.5)
    to_receiver(receiver, written(1, 4, 4), 1.5)
    assert (receiver.peer, receiver.error, receiver.transferred_tokens) == (0, None, 4)


def test_the_loss_becomes_the_error_if_no_other_peer_is_named_in_time() -> None:
    receiver = half()
    receiver.expire(1.0)
    lost = receiver.failover.lost
    assert receiver.next_timeout() is not None
    receiver.expire(1.0 + WAIT - 0.01)
    assert receiver.error is None
    receiver.expire(1.0 + WAIT)
    assert receiver.error is lost is not None
    assert receiver.phase is Phase.FAILED


def test_without_failover_a_loss_fails_the_transfer() -> None:
    receiver = half(timeout=None)
    receiver.expire(1.0)
    assert isinstance(receiver.error, PeerGone)


def test_a_room_without_an_answer_can_be_redirected() -> None:
    receiver = new_receiver()
    receiver.expire(1.0)
    assert (receiver.phase, receiver.error) == (Phase.BOOTSTRAPPING, None)
    assert receiver.failover.lost is not None
    receiver.redirected(1.5)
    receiver.take_commands()
    to_receiver(receiver, an_offer(12, generation=receiver.generation), 1.5, OTHER)
    finish(receiver, 1.5, start=0)
    assert receiver.poll() is KVPoll.Success


def test_each_peer_has_its_own_time_outs_and_failure_counts() -> None:
    receiver = half(max_peer_losses=1, max_bad_chunks=1)
    now = 0.0
    for _ in range(3):
        to_receiver(receiver, m.Abort(ROOM, "aborted", "shutting down", 0), now, receiver.peer)
        assert receiver.failover.lost is not None
        receiver.redirected(now + 1)
        now += 1.5
        to_receiver(receiver, an_offer(12, generation=receiver.generation), now, OTHER)
        receiver.expire(now)
    assert receiver.error is None
    assert receiver.wanted(now) == (4, 8)


def test_repeated_damaged_chunks_cause_a_failover() -> None:
    receiver = half(max_bad_chunks=1)
    for offset in (4, 8):
        report_chunk(receiver, 1, offset, 4, matches=False)
    assert isinstance(receiver.failover.lost, IntegrityError)
    receiver.redirected(1.0)
    to_receiver(receiver, an_offer(12, generation=receiver.generation), 1.0, OTHER)
    assert receiver.wanted(1.0) == (4, 8)  # at once: the pause applied to the lost peer
    receiver.grant((3,), 2, 1.0)
    to_receiver(receiver, written(2, 4, 4), 1.0, OTHER)
    receiver.verified_chunk(2, 4, matches=False, now=1.0)
    assert receiver.failover.lost is None  # the first damaged chunk of this peer
    assert receiver.wanted(1.0) == (4, 8)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_only_errors_caused_by_the_peer_cause_a_failover(code: str) -> None:
    receiver = half()
    to_receiver(receiver, m.Abort(ROOM, code, "a reason", 0))
    assert (receiver.error is None) == issubclass(BY_CODE[code], CAUSED_BY_PEER)


@pytest.mark.parametrize("cause", [PeerGone("no such host: encode-7"), OSError("no such host: encode-7")])
@pytest.mark.parametrize("timeout", [None, WAIT])
def test_an_endpoint_that_cannot_be_reached_is_given_up_at_once(cause: Exception, timeout: float | None) -> None:
    receiver = new_receiver(timeout)
    receiver.peer_unreachable(cause, 0.5)
    gone = receiver.error or receiver.failover.lost
    assert isinstance(gone, PeerGone)
    assert "no such host: encode-7" in gone.detail
    assert (receiver.error is None) == (timeout is not None)
    if timeout is not None:
        receiver.peer_unreachable(cause, 0.6)  # late, of the endpoint that was given up
        assert receiver.error is None
        receiver.redirected(1.0)
        to_receiver(receiver, an_offer(12, generation=receiver.generation), 1.0, OTHER)
        finish(receiver, 1.0, start=0)
        assert receiver.poll() is KVPoll.Success


def test_a_peer_that_cannot_be_reached_any_more_is_lost_and_given_up_the_second_time() -> None:
    receiver = half(timeout=None)
    receiver.peer_unreachable(ConnectionRefusedError(), 0.5)
    assert (receiver.phase, receiver.error) == (Phase.RESUMING, None)
    commands = receiver.take_commands()
    assert Revoke(1) in commands
    receiver.peer_unreachable(ConnectionRefusedError(), 0.9)
    assert isinstance(receiver.error, PeerGone)
    assert "ConnectionRefusedError" in receiver.error.detail
    receiver.revoked(1)
    receiver.consumed(1, 0)
    assert receiver.settled(0.9)


def test_a_receiver_that_has_ended_does_not_linger_for_a_peer_that_cannot_be_reached() -> None:
    receiver = half()
    receiver.clear(0.5)
    receiver.take_commands()
    receiver.peer_unreachable(ConnectionRefusedError(), 0.6)
    assert receiver.take_commands() == [Revoke(1)]
    receiver.revoked(1)
    assert receiver.settled(0.6)


def test_a_protocol_violation_fails_the_transfer() -> None:
    receiver = half()
    to_receiver(receiver, m.Written(ROOM, 1, (m.Chunk(4, 4, None),)))
    assert isinstance(receiver.error, RemoteProtocolError)


def test_a_transfer_whose_last_chunks_are_being_verified_needs_no_other_peer() -> None:
    receiver = half()
    for offset in (4, 8):
        to_receiver(receiver, written(1, offset, 4))
    to_receiver(receiver, m.Abort(ROOM, LeaseExpired.code, "too slow", 0))
    assert receiver.failover.lost is not None
    for offset in (4, 8):
        receiver.verified_chunk(1, offset, matches=True, now=0.5)
    assert receiver.poll() is KVPoll.Success
