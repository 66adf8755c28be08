"""The receiver's state machine, by examples."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Admit, CloseBlocks, Deliver, Release, Revoke, Send, Verify
from embferry.protocol.errors import (
    Aborted,
    CapacityError,
    IntegrityError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import KVPoll, Phase
from embferry.protocol.validation import MAX_OPEN_RUNS, MAX_OUTSTANDING

from .builders import (
    CHECKSUM,
    ENCODE,
    LANGUAGE,
    ROOM,
    SETTINGS,
    TRANSPORTS,
    an_offer,
    new_receiver,
    offered,
    other_commands,
    report_chunk,
    sent_messages,
    to_receiver,
    written,
)
from .ends import LAYOUT, TOKEN_BYTES


def test_a_receiver_begins_with_an_open_message() -> None:
    receiver = new_receiver()
    assert sent_messages(receiver) == [
        m.Open(ROOM, 1, (1, 1), receiver.geometry, "language", TRANSPORTS, 0),
    ]
    assert receiver.poll() is KVPoll.Bootstrapping
    assert receiver.wanted(0.0) is None


def test_an_embedding_that_fits_arrives_in_one_transfer() -> None:
    receiver = offered(6)
    assert receiver.poll() is KVPoll.WaitingForInput
    assert receiver.wanted(0.0) == (0, 6)
    assert receiver.grant((3, 9), 1, 0.0) == 6
    assert receiver.take_commands()[0] == Admit(1, (3, 9), "tcp", b"")  # before the grant goes out
    to_receiver(receiver, written(1, 0, 4))
    assert other_commands(receiver) == [
        CloseBlocks(1, (3,)),
        Verify(1, 0, 4, (3,), CHECKSUM),
    ]  # no write can change the blocks during verification
    receiver.verified_chunk(1, 0, matches=True, now=0.0)
    assert receiver.take_commands()[0] == Deliver(1, 0, 4, (3,))
    assert (receiver.poll(), receiver.transferred_tokens) == (KVPoll.Transferring, 4)
    report_chunk(receiver, 1, 4, 2)
    assert sent_messages(receiver) == [m.Confirm(ROOM, 6)]
    assert (receiver.poll(), receiver.transferred_tokens, receiver.transfers) == (KVPoll.Success, 6, 1)
    assert not receiver.settled(0.0)
    receiver.consumed(1, 0)
    receiver.consumed(1, 4)
    assert other_commands(receiver) == [Release((3,)), Release((9,))]
    assert not receiver.settled(0.0)
    to_receiver(receiver, m.Closed(ROOM))
    assert receiver.settled(0.0)
    assert receiver.next_timeout() is None


def test_resumed_transfers_may_start_at_any_token() -> None:
    receiver = new_receiver()
    to_receiver(receiver, an_offer(-1))
    assert receiver.wanted(0.0) == (0, 6)  # the length is not known: the default allocation
    assert receiver.grant((0, 1), 1, 0.0) == 6
    assert receiver.wanted(0.0) is None
    to_receiver(receiver, an_offer(25))
    asked = []
    for epoch, blocks in ((2, (4, 5)), (3, (6, 7)), (4, (8,))):
        tokens = receiver.grant(blocks, epoch, 0.0)
        asked += [body for body in sent_messages(receiver) if isinstance(body, m.Grant)]
        assert tokens == asked[-1].allocated_tokens
    assert [(grant.sent_tokens, grant.allocated_tokens) for grant in asked] == [(0, 6), (6, 8), (14, 8), (22, 3)]
    assert (receiver.wanted(0.0), receiver.transfers) == (None, 4)
    for epoch, offset, length in ((3, 18, 4), (1, 0, 4), (4, 22, 3), (2, 10, 4), (1, 4, 2), (2, 6, 4), (3, 14, 4)):
        report_chunk(receiver, epoch, offset, length)
    assert (receiver.poll(), receiver.transferred_tokens) == (KVPoll.Success, 25)


def test_a_length_that_becomes_known_trims_a_larger_grant() -> None:
    receiver = new_receiver(default_allocate_tokens=16)
    to_receiver(receiver, an_offer(-1))
    receiver.grant((0, 1, 2, 3), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, written(1, 0, 4))
    assert other_commands(receiver) == []  # verification waits until the end of the last chunk is known
    to_receiver(receiver, an_offer(6))
    assert other_commands(receiver) == [CloseBlocks(1, (2, 3)), Release((2, 3))]
    report_chunk(receiver, 1, 0, 4)
    report_chunk(receiver, 1, 4, 2)
    assert receiver.poll() is KVPoll.Success


def test_a_length_of_zero_releases_the_whole_grant() -> None:
    receiver = new_receiver(default_allocate_tokens=8)
    to_receiver(receiver, an_offer(-1))
    receiver.grant((0,), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, an_offer(0))
    assert other_commands(receiver) == [CloseBlocks(1, (0,)), Release((0,))]
    assert receiver.poll() is KVPoll.Success


def test_a_length_that_ends_in_the_last_block_releases_no_block() -> None:
    receiver = new_receiver(default_allocate_tokens=7)
    to_receiver(receiver, an_offer(-1))
    receiver.grant((0, 1), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, an_offer(6))
    assert other_commands(receiver) == []
    report_chunk(receiver, 1, 4, 2)
    assert receiver.wanted(0.0) is None


def test_an_embedding_without_tokens_is_complete_when_it_is_offered() -> None:
    receiver = offered(0)
    assert (receiver.poll(), receiver.transfers) == (KVPoll.Success, 0)


def test_a_bad_chunk_is_requested_again_alone() -> None:
    receiver = offered(12)
    receiver.grant((0, 1, 2), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    report_chunk(receiver, 1, 4, 4, matches=False)
    report_chunk(receiver, 1, 8, 4)
    assert Release((1,)) in other_commands(receiver)
    assert (receiver.transferred_tokens, receiver.wanted(0.0)) == (4, (4, 4))
    receiver.grant((1,), 2, 0.0)
    report_chunk(receiver, 2, 4, 4)
    assert receiver.poll() is KVPoll.Success


def test_a_failed_write_is_requested_again_only_if_it_is_retryable() -> None:
    receiver = offered(4)
    receiver.grant((0,), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, m.WriteFailed(ROOM, 1, 0, 4, "transport_error", "the link broke", True))
    assert other_commands(receiver) == [CloseBlocks(1, (0,)), Release((0,))]
    receiver.grant((0,), 2, 0.0)
    to_receiver(receiver, m.WriteFailed(ROOM, 2, 0, 4, "transport_error", "no transport", False))
    assert isinstance(receiver.error, TransportError)
    to_receiver(receiver, m.WriteFailed(ROOM, 2, 0, 4, "transport_error", "no transport", False))  # repeated: ignored


def test_bad_chunks_in_a_row_are_retried_after_a_pause_until_the_limit() -> None:
    receiver = offered(4, max_bad_chunks=2)
    for epoch, pause in ((1, 0.0), (2, 0.1), (3, None)):
        receiver.grant((0,), epoch, 10.0 * epoch)
        to_receiver(receiver, written(epoch, 0, 4), 10.0 * epoch)
        receiver.verified_chunk(epoch, 0, matches=False, now=10.0 * epoch)
        if pause:
            assert receiver.wanted(10.0 * epoch) is None
            assert receiver.next_timeout() == 10.0 * epoch + pause
            receiver.expire(10.0 * epoch + pause)
            assert receiver.wanted(10.0 * epoch + pause) == (0, 4)
    assert isinstance(receiver.error, IntegrityError)
    assert receiver.retry_policy.bad_chunks == 3


def test_a_good_chunk_resets_the_count_of_bad_ones() -> None:
    receiver = offered(8, max_bad_chunks=1)
    for epoch in (1, 3):
        receiver.grant((0,), epoch, 0.0)
        offset = receiver.ledger.active[0].start
        report_chunk(receiver, epoch, offset, 4, matches=False)
        receiver.grant((0,), epoch + 1, 0.0)
        report_chunk(receiver, epoch + 1, offset, 4)
    assert receiver.poll() is KVPoll.Success


def test_repeated_and_foreign_reports_are_ignored() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    receiver.take_commands()
    to_receiver(receiver, written(1, 0, 4))
    to_receiver(receiver, written(9, 0, 4))
    to_receiver(receiver, written(1, 4, 4), source=ENCODE + 1)
    receiver.receive(ENCODE, LANGUAGE + 1, written(1, 4, 4), 0.0)
    to_receiver(receiver, m.Pending(ROOM, 1))
    to_receiver(receiver, m.Progress(ROOM, 8, 0))  # a receiver's message, sent to a receiver
    to_receiver(receiver, m.Closed(ROOM))
    to_receiver(receiver, m.Unknown(ROOM, ENCODE + 1))
    to_receiver(receiver, an_offer(8), source=0)
    receiver.consumed(5, 0)
    receiver.revoked(5)
    assert receiver.take_commands() == []
    assert receiver.poll() is KVPoll.Transferring


@pytest.mark.parametrize(("offset", "length"), [(0, 3), (1, 3), (2, 4), (4, 8), (12, 4)])
def test_a_report_of_partial_or_foreign_blocks_is_a_protocol_error_of_the_peer(offset: int, length: int) -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    to_receiver(receiver, written(1, offset, length))
    assert isinstance(receiver.error, RemoteProtocolError)
    assert receiver.error.room == ROOM
    assert m.Abort(ROOM, "remote_protocol_error", receiver.error.detail) in sent_messages(receiver)


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (an_offer(4, transport="unknown"), "was not among ours"),
        (an_offer(4, version=2), "version 2"),
        (an_offer(4, digest=b""), "without a content digest"),
    ],
)
def test_an_invalid_offer_is_a_protocol_error_of_the_peer(offer: m.Offer, why: str) -> None:
    receiver = new_receiver()
    to_receiver(receiver, offer)
    assert isinstance(receiver.error, RemoteProtocolError)
    assert why in receiver.error.detail
    assert isinstance(sent_messages(receiver)[-1], m.Abort)


@pytest.mark.parametrize(
    ("limits", "total", "named"),
    [
        ({"max_embedding_bytes": 10 * TOKEN_BYTES}, 10, None),
        ({"max_embedding_bytes": 10 * TOKEN_BYTES}, 11, ("88 bytes", "80", "max_embedding_bytes")),
        ({}, m.MAX_TOKENS, (str(8 * m.MAX_TOKENS), str(16 << 30), "max_embedding_bytes")),
        ({"max_tokens": 10}, 10, None),
        ({"max_tokens": 10}, 0, None),
        ({"max_tokens": 10}, 11, ("11 tokens", "10", "max_tokens")),
    ],
)
@pytest.mark.parametrize("failover_timeout", [None, 5.0])
def test_an_embedding_that_is_too_long_is_refused_before_a_block_is_granted(
    limits: dict[str, int], total: int, named: tuple[str, ...] | None, failover_timeout: float | None
) -> None:
    receiver = new_receiver(**limits)
    receiver.failover.timeout = failover_timeout
    receiver.take_commands()
    to_receiver(receiver, an_offer(-1))
    to_receiver(receiver, an_offer(total))
    if named is None:
        assert receiver.error is None
        return
    assert isinstance(receiver.error, CapacityError)
    assert not receiver.error.retryable
    assert all(part in receiver.error.detail for part in named)
    assert receiver.wanted(0.0) is None
    assert [type(command) for command in receiver.take_commands()] == [Send]
    assert receiver.total_tokens == -1


def test_a_refusal_ends_the_transfer_unless_it_is_of_an_earlier_generation() -> None:
    receiver = new_receiver()
    to_receiver(receiver, m.Abort(ROOM, "aborted", "of an earlier generation", 0), source=9)
    assert receiver.phase is Phase.BOOTSTRAPPING
    to_receiver(receiver, m.Abort(ROOM, "layout_mismatch", "a bfloat16[8] here, a float32[8] there", 1), source=9)
    assert str(receiver.error) == "[layout_mismatch] room 7: a bfloat16[8] here, a float32[8] there"
    assert receiver.settled(0.0)  # the peer needs no abort


def test_an_abort_of_the_peer_fails_the_transfer_and_drains_its_grants() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, m.Abort(ROOM, "capacity_exhausted", "no memory"), source=9)  # from a foreign session
    to_receiver(receiver, m.Abort(ROOM, "capacity_exhausted", "no memory"))
    assert (receiver.poll(), str(receiver.error)) == (KVPoll.Failed, "[capacity_exhausted] room 7: no memory")
    assert sent_messages(receiver) == [m.Drain(ROOM, (1,))]
    assert not receiver.settled(100.0)
    to_receiver(receiver, m.Drained(ROOM, (9,)))
    to_receiver(receiver, m.Drained(ROOM, (1,)))
    assert other_commands(receiver) == [CloseBlocks(1, (0, 1)), Release((0, 1))]
    assert receiver.settled(0.0)


def test_an_abort_is_repeated_and_drains_before_it_revokes() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    to_receiver(receiver, written(1, 0, 4))
    receiver.take_commands()
    receiver.abort(Aborted("asked for", room=ROOM), 0.0)
    receiver.abort(Aborted("once more", room=ROOM), 0.0)
    abort = m.Abort(ROOM, "aborted", "asked for")
    assert sent_messages(receiver) == [m.Drain(ROOM, (1,)), abort]
    receiver.verified_chunk(1, 0, matches=True, now=0.0)  # too late to count
    assert other_commands(receiver) == [Release((0,))]
    receiver.expire(0.1)
    assert sent_messages(receiver) == [m.Drain(ROOM, (1,)), abort]
    to_receiver(receiver, m.Closed(ROOM))
    receiver.expire(SETTINGS.drain_timeout)
    assert receiver.take_commands()[:1] == [Revoke(1)]
    assert receiver.transferred_tokens == 0
    receiver.revoked(1)
    assert other_commands(receiver) == [CloseBlocks(1, (1,)), Release((1,))]
    assert receiver.settled(SETTINGS.drain_timeout)


def test_clear_aborts_and_releases_every_block() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    receiver.take_commands()
    receiver.clear(0.0)
    assert other_commands(receiver) == [Release((0,))]
    assert isinstance(receiver.error, Aborted)


@pytest.mark.parametrize(
    ("blocks", "epoch"), [((), 1), ((0, 1, 2), 1), ((0,), 0)], ids=["none", "more than needed", "old epoch"]
)
def test_an_invalid_grant_is_an_error_of_the_caller(blocks: tuple[int, ...], epoch: int) -> None:
    receiver = offered(8)
    with pytest.raises(LocalProtocolError):
        receiver.grant(blocks, epoch, 0.0)
    assert receiver.take_commands() == []


def test_a_grant_of_too_many_runs_is_an_error_of_the_caller() -> None:
    geometry = Geometry(LAYOUT, 2 * m.MAX_RUNS + 2, 1)
    receiver = Receiver(ROOM, LANGUAGE, geometry, "language", TRANSPORTS, SETTINGS, 0.0)
    to_receiver(receiver, an_offer(m.MAX_RUNS + 1))
    with pytest.raises(LocalProtocolError, match=str(m.MAX_RUNS)):
        receiver.grant(tuple(range(0, 2 * m.MAX_RUNS + 2, 2)), 1, 0.0)


def test_a_receiver_asks_for_no_more_runs_than_a_sender_takes_up() -> None:
    count = MAX_OPEN_RUNS // m.MAX_RUNS
    blocks = tuple(range(0, 2 * m.MAX_RUNS, 2))
    geometry = Geometry(LAYOUT, 2 * m.MAX_RUNS, 1)
    receiver = Receiver(ROOM, LANGUAGE, geometry, "language", TRANSPORTS, SETTINGS, 0.0)
    to_receiver(receiver, an_offer(10 * MAX_OPEN_RUNS))
    for epoch in range(1, count + 1):
        receiver.grant(blocks, epoch, 0.0)
    assert receiver.wanted(0.0) is None
    to_receiver(receiver, written(1, 0, m.MAX_RUNS))
    assert receiver.wanted(0.0) == (MAX_OPEN_RUNS, 9 * MAX_OPEN_RUNS)
    receiver.peer_lost(0.0)
    for epoch in range(2, count + 1):
        receiver.revoked(epoch)
    assert receiver.ledger.open_runs == 0


def test_the_number_of_outstanding_grants_is_bounded() -> None:
    receiver = offered(4 * (MAX_OUTSTANDING + 1))
    for epoch in range(1, MAX_OUTSTANDING + 1):
        receiver.grant((0,), epoch, 0.0)
    assert receiver.wanted(0.0) is None
    to_receiver(receiver, written(1, 0, 4))
    assert receiver.wanted(0.0) == (4 * MAX_OUTSTANDING, 4)
