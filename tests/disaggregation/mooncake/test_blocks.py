"""Our receiver's blocks: given in turn, and never to two writers, whatever the origin's sender does later."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.disaggregation.mooncake.receiving import MAX_PAST
from embferry.protocol.errors import Aborted, LeaseExpired, TransportError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .origin_peers import BLOCK, BLOCKS, SUCCESS, TRANSFERRING, embedding
from .ours import equal, eventually, language_manager, opened

pytestmark = pytest.mark.integration


def test_rooms_take_turns_for_blocks_and_hold_none_while_they_wait(manager, sender, address):
    sender.encode(embedding(60))
    receivers = [opened(manager, address, room) for room in range(1, 8)]
    over = 0
    while over < len(receivers):
        over += sender.answer(sender.hear()) == SUCCESS
    for receiver in receivers:
        receiver.wait(10)
        assert equal(receiver.arrays(), embedding(60))
    assert manager.allocator.available == BLOCKS


def test_late_writes_of_a_room_that_failed_change_nothing(world, manager, sender, address):
    sender.encode(embedding(20))
    lost = opened(manager, address, 1)
    late = sender.hear()
    landing = manager._landing
    lost.abort()
    assert lost.poll() is KVPoll.Failed
    assert isinstance(lost.failure_exception(), Aborted)
    assert landing.session_id not in world.engines, "no other room used it, so it is closed already"
    assert manager.allocator.available == BLOCKS
    rows = embedding(20, seed=2)
    sender.encode(rows)
    receiver = opened(manager, address, 2)
    frames = sender.hear()
    assert frames[3] != late[3], "a session of its own, registered anew"
    assert not set(landing.pointers) & set(manager._landing.pointers), "addresses are not used again soon"
    assert sender.answer(frames) == SUCCESS
    with pytest.raises(AssertionError):
        sender.write(late)  # refused by the engine; by page tables where it has begun
    receiver.wait(10)
    assert equal(receiver.arrays(), rows)


def test_blocks_stay_quarantined_as_long_as_another_room_needs_the_way_in(world, manager, sender, address):
    rows = embedding(40)
    sender.encode(rows)
    good, lost = opened(manager, address, 1), opened(manager, address, 2)
    first, late = sender.hear(), sender.hear()
    landing = manager._landing
    lost.abort()
    assert manager.allocator.quarantined == 3
    sender.write(late)  # it may; nobody else has these blocks
    assert sender.answer(first) == TRANSFERRING
    assert sender.answer(sender.hear()) == SUCCESS
    good.wait(10)
    assert equal(good.arrays(), rows)
    eventually(lambda: landing.session_id not in world.engines)
    assert (manager.allocator.quarantined, manager.allocator.available) == (0, BLOCKS)
    manager.allocator.check_integrity()


def test_a_room_that_waits_for_blocks_is_served_as_soon_as_there_are_some(world, sender, address):
    quick = TransferSettings(bootstrap_timeout=0.2)
    with language_manager(world, transfer=quick) as manager:
        sender.encode(embedding(8))
        other = manager.open(1, address)
        other.init(manager.allocate(BLOCKS * BLOCK, 1))
        sender.hear()
        receiver = opened(manager, address, 2)
        eventually(lambda: receiver.target is not None)
        assert not sender.pull.poll(300), "longer than it may take to find the encode side, which it has found"
        assert receiver.poll() is KVPoll.Bootstrapping
        other.abort()
        assert sender.answer(sender.hear()) == SUCCESS
        receiver.wait(10)


def test_a_room_may_be_used_again_while_its_earlier_blocks_are_quarantined(manager, sender, address):
    rows = embedding(20)
    sender.encode(rows)
    other, lost = opened(manager, address, 1), opened(manager, address, 2)
    sender.hear()
    late = sender.hear()
    lost.abort()
    again = opened(manager, address, 2)
    frames = sender.hear()
    sender.report(late, SUCCESS)  # about blocks that this room no longer has
    assert sender.answer(frames) == SUCCESS
    again.wait(10)
    assert equal(again.arrays(), rows)
    assert manager.allocator.quarantined == 3
    other.abort()
    assert manager.allocator.available == BLOCKS


def test_a_room_that_keeps_blocks_from_itself_gives_up_in_time(world, sender, address):
    quick = TransferSettings(transfer_timeout=0.3, default_allocate_tokens=BLOCK)
    with language_manager(world, transfer=quick) as manager:
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
        with pytest.raises(LeaseExpired, match="no blocks were free"):
            half.wait(10)
        manager.allocator.free(hog.blocks, 3)
        assert manager.allocator.available == BLOCKS
        rows = embedding(20, seed=3)
        sender.encode(rows)
        receiver = opened(manager, address, 4)
        while receiver.poll() is not KVPoll.Success:
            if sender.pull.poll(50):
                sender.answer(sender.hear())
        assert equal(receiver.arrays(), rows)


def test_an_engine_that_does_not_start_is_the_callers_to_hear_or_ends_the_room(world, sender, address):
    def broken(*_: object) -> None:
        raise TransportError("the engine cannot start", retryable=False)

    with language_manager(world) as manager:
        rows = embedding(20)
        sender.encode(rows)
        real, manager.open_engine = manager.open_engine, broken
        with pytest.raises(TransportError, match="cannot start"):
            opened(manager, address, 1)
        manager.open_engine = real
        other = manager.open(2, address)
        other.init(manager.allocate(BLOCKS * BLOCK, 2))
        sender.hear()
        waiting = opened(manager, address, 3)
        eventually(lambda: waiting.target is not None)
        manager.open_engine = broken
        other.abort()
        with pytest.raises(TransportError, match="cannot start"):
            waiting.wait(10)
        manager.open_engine = real
        receiver = opened(manager, address, 4)
        sender.answer(sender.hear())
        receiver.wait(10)
        assert equal(receiver.arrays(), rows)
        assert manager.allocator.available == BLOCKS


def test_failures_without_end_cost_neither_memory_nor_engines(world, manager, sender, address):
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    sender.encode(embedding(20))
    seen = []
    for room in range(3 * MAX_PAST):
        lost = opened(manager, address, room)
        sender.hear()
        lost.abort()
        seen.append(mappings())
    assert manager.allocator.available == BLOCKS
    assert len(world.engines) == 1, "the sender's"
    assert max(seen[2 * MAX_PAST :]) <= max(seen[: 2 * MAX_PAST]) + 8
