"""Blocks of our receiver: allocated in turn, and never to two writers at a time, even if a sender writes late."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.disaggregation.mooncake.pool_mapping import MAX_CLOSED_MAPPINGS
from embferry.protocol.errors import Aborted, LeaseExpired, TransportError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .builders import WAIT_S, StoppedClock, equal, eventually, language_manager, started
from .origin_peers import BLOCK, BLOCKS, SUCCESS, TRANSFERRING, embedding

pytestmark = pytest.mark.integration


def test_rooms_get_blocks_in_turn_and_hold_none_while_they_wait(manager, sender, address):
    sender.encode(embedding(60))
    receivers = [started(manager, address, room) for room in range(1, 8)]
    successes = 0
    while successes < len(receivers):
        successes += sender.answer(sender.hear()) == SUCCESS
    for receiver in receivers:
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), embedding(60))
    assert manager.allocator.available == BLOCKS


def test_late_writes_of_a_room_that_failed_change_nothing(network, manager, sender, address):
    sender.encode(embedding(20))
    lost = started(manager, address, 1)
    late = sender.hear()
    mapping = manager.pool.current
    lost.abort()
    assert lost.poll() is KVPoll.Failed
    assert isinstance(lost.failure_exception(), Aborted)
    assert mapping.session_id not in network.engines, "no other room used the mapping, so it is closed"
    assert manager.allocator.available == BLOCKS
    rows = embedding(20, seed=2)
    sender.encode(rows)
    receiver = started(manager, address, 2)
    frames = sender.hear()
    assert frames[3] != late[3], "another session, registered anew"
    assert not set(mapping.pointers) & set(manager.pool.current.pointers), "addresses are not reused soon"
    assert sender.answer(frames) == SUCCESS
    with pytest.raises(AssertionError):
        sender.write(late)  # the engine refuses it; a write that has begun fails at the page tables
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)


def test_blocks_stay_quarantined_while_another_room_uses_their_mapping(network, manager, sender, address):
    rows = embedding(40)
    sender.encode(rows)
    good, lost = started(manager, address, 1), started(manager, address, 2)
    first, late = sender.hear(), sender.hear()
    mapping = manager.pool.current
    lost.abort()
    assert manager.allocator.quarantined == 3
    sender.write(late)  # succeeds; no other room has these blocks
    assert sender.answer(first) == TRANSFERRING
    assert sender.answer(sender.hear()) == SUCCESS
    good.wait(WAIT_S)
    assert equal(good.arrays(), rows)
    eventually(lambda: mapping.session_id not in network.engines)
    assert (manager.allocator.quarantined, manager.allocator.available) == (0, BLOCKS)
    manager.allocator.check_integrity()


def test_a_room_waits_for_blocks_without_a_time_out_and_gets_them_when_some_are_free(network, sender, address):
    with language_manager(network) as manager:
        clock = StoppedClock(manager)
        sender.encode(embedding(8))
        other = manager.open(1, address)
        other.init(manager.allocate(BLOCKS * BLOCK, 1))
        sender.hear()
        receiver = started(manager, address, 2)
        eventually(lambda: receiver.encode_rank is not None)
        clock.pass_time(60)  # longer than bootstrap_timeout
        assert not sender.pull.poll(100), "no request was sent"
        assert receiver.poll() is KVPoll.Bootstrapping
        other.abort()
        assert sender.answer(sender.hear()) == SUCCESS
        receiver.wait(WAIT_S)


def test_a_room_can_be_opened_again_while_its_earlier_blocks_are_quarantined(manager, sender, address):
    rows = embedding(20)
    sender.encode(rows)
    other, lost = started(manager, address, 1), started(manager, address, 2)
    sender.hear()
    late = sender.hear()
    lost.abort()
    again = started(manager, address, 2)
    frames = sender.hear()
    sender.report(late, SUCCESS)  # names blocks that this room has lost
    assert sender.answer(frames) == SUCCESS
    again.wait(WAIT_S)
    assert equal(again.arrays(), rows)
    assert manager.allocator.quarantined == 3
    other.abort()
    assert manager.allocator.available == BLOCKS


def test_a_room_whose_own_mapping_keeps_its_blocks_quarantined_times_out(network, sender, address):
    with language_manager(network, transfer=TransferSettings(default_allocate_tokens=BLOCK)) as manager:
        clock = StoppedClock(manager)
        sender.encode(embedding(20))
        half = manager.open(1, address)
        half.init(manager.allocate(BLOCK, 1))
        first = sender.hear()
        lost = manager.open(2, address)
        lost.init(manager.allocate((BLOCKS - 1) * BLOCK, 2))
        sender.hear()
        sender.answer(first)
        eventually(lambda: half.needs_resume)
        hog = manager.allocate(BLOCK, 3)
        lost.abort()
        half.resume_transfer(sent_tokens=BLOCK)
        assert manager.allocator.quarantined == BLOCKS - 1
        clock.pass_time(60)  # longer than transfer_timeout
        with pytest.raises(LeaseExpired, match="no blocks were free"):
            half.wait(WAIT_S)
        manager.allocator.free(hog.blocks, 3)
        assert manager.allocator.available == BLOCKS
        rows = embedding(20, seed=3)
        sender.encode(rows)
        receiver = started(manager, address, 4)
        while receiver.poll() is not KVPoll.Success:
            if sender.pull.poll(50):
                sender.answer(sender.hear())
        assert equal(receiver.arrays(), rows)


def test_a_room_that_is_due_for_blocks_may_still_be_given_some_by_its_caller(manager, sender, address):
    rows = embedding(50)
    sender.encode(rows)
    receiver = started(manager, address)

    def give_blocks() -> None:  # on the driver thread, before it allocates in turn
        if receiver.needs_resume:
            receiver.resume_transfer(manager.allocate(BLOCK, receiver.room), receiver.transferred_tokens)

    receiver.wake_on_change(give_blocks)
    requested = []
    while sum(requested) < 50:
        frames = sender.hear()
        requested.append(sender.allocated(frames))
        sender.answer(frames)
    receiver.wait(WAIT_S)
    assert requested == [3 * BLOCK, *[BLOCK] * 4]
    assert equal(receiver.arrays(), rows)
    assert manager.allocator.available == BLOCKS


def test_an_engine_that_does_not_start_is_an_error_of_init_or_fails_the_room(network, sender, address):
    def broken(*_: object) -> None:
        raise TransportError("the engine cannot start", retryable=False)

    with language_manager(network) as manager:
        rows = embedding(20)
        sender.encode(rows)
        real, manager.open_engine = manager.open_engine, broken
        with pytest.raises(TransportError, match="cannot start"):
            started(manager, address, 1)
        manager.open_engine = real
        other = manager.open(2, address)
        other.init(manager.allocate(BLOCKS * BLOCK, 2))
        sender.hear()
        waiting = started(manager, address, 3)
        eventually(lambda: waiting.encode_rank is not None)
        manager.open_engine = broken
        other.abort()
        with pytest.raises(TransportError, match="cannot start"):
            waiting.wait(WAIT_S)
        manager.open_engine = real
        receiver = started(manager, address, 4)
        sender.answer(sender.hear())
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), rows)
        assert manager.allocator.available == BLOCKS


def test_many_failed_rooms_leave_no_mappings_and_no_engines(network, manager, sender, address):
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    sender.encode(embedding(20))
    seen = []
    for room in range(3 * MAX_CLOSED_MAPPINGS):
        lost = started(manager, address, room)
        sender.hear()
        lost.abort()
        seen.append(mappings())
    assert manager.allocator.available == BLOCKS
    assert len(network.engines) == 1, "only the sender's engine is left"
    assert max(seen[2 * MAX_CLOSED_MAPPINGS :]) <= max(seen[: 2 * MAX_CLOSED_MAPPINGS]) + 8
