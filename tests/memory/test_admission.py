"""The order and size of grants from a pool."""

from __future__ import annotations

from embferry.memory.admission import MOST_AT_ONCE, PIPELINE, RESERVE, PoolAdmission
from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.protocol.commands import Release
from embferry.protocol.errors import Aborted
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import MAX_RUNS, Offer
from embferry.protocol.receiver import Receiver

from ..protocol.builders import SETTINGS, TRANSPORTS
from ..protocol.ends import LAYOUT


def pool(num_blocks: int, *totals: int) -> tuple[PoolAdmission, list[Receiver]]:
    """Returns a pool of one-token blocks and receivers that wait for ``totals`` tokens from it."""
    admission = PoolAdmission(ReqToMetadataBlockAllocator(num_blocks, 1))
    receivers = []
    for room, total in enumerate(totals):
        geometry = Geometry(LAYOUT, num_blocks, 1)
        receiver = Receiver(room, room + 1, geometry, "language", TRANSPORTS, SETTINGS, 0.0)
        receiver.receive(1000, room + 1, Offer(room, 1, 1, "tcp", total, b"content"), 0.0)
        admission.register(receiver)
        receivers.append(receiver)
    return admission, receivers


def granted(receiver: Receiver) -> list[int]:
    """Returns the number of blocks of each outstanding grant."""
    return [len(grant.blocks) for grant in receiver.ledger]


def served(admission: PoolAdmission) -> list[Receiver]:
    """Allocates the free blocks and returns the receivers served, in order."""
    return [receiver for receiver, _ in admission.allocate(0.0)]


def give_back(admission: PoolAdmission, receiver: Receiver) -> None:
    """Returns every granted block to the pool, unwritten."""
    receiver.take_commands()
    receiver.peer_lost(0.0)
    for grant in receiver.ledger:
        receiver.revoked(grant.epoch)
    for command in receiver.take_commands():
        if isinstance(command, Release):
            admission.release(receiver, command.blocks)


def test_a_small_transfer_is_granted_all_it_needs_at_once() -> None:
    admission, (large, small) = pool(8, 1000, 2)
    assert served(admission)[:2] == [large, small]
    assert granted(small) == [2]
    assert sum(granted(large)) == 6
    assert admission.allocator.available == 0
    assert admission.allocate(0.0) == []


def test_an_embedding_larger_than_the_pool_is_granted_parts_of_it() -> None:
    admission, (large,) = pool(8, 1000)
    admission.allocate(0.0)
    assert granted(large) == [8 // PIPELINE] * PIPELINE


def test_a_small_transfer_is_served_from_the_reserve_beside_a_large_one() -> None:
    admission, (large, small) = pool(32, 1000, 2)
    admission.unregister(small)
    admission.allocate(0.0)
    assert sum(granted(large)) == 32 - 32 // RESERVE
    assert admission.allocate(0.0) == []
    admission.register(small)
    assert served(admission) == [small]
    assert granted(small) == [2]


def test_a_grant_has_a_smallest_size_however_many_transfers_wait() -> None:
    admission, receivers = pool(2 * MOST_AT_ONCE, *[1000] * 100)
    assert served(admission) == receivers[:MOST_AT_ONCE]
    assert granted(receivers[0]) == [2]


def test_waiting_transfers_are_served_in_turn() -> None:
    admission, receivers = pool(1, 5, 5, 5)
    for turn in (0, 1, 2):
        (one,) = served(admission)
        assert one is receivers[turn]
        give_back(admission, one)
    admission.unregister(receivers[0])
    admission.unregister(receivers[0])
    assert admission.allocator.available == 1


def test_blocks_allocated_by_the_caller_are_granted_under_the_next_epoch() -> None:
    admission, (first, second) = pool(4, 2, 2)
    admission.unregister(first)
    allocation = admission.allocator.alloc_blocks(2, first.room)
    assert allocation is not None
    assert admission.grant(first, allocation, 0.0) == 2
    assert served(admission) == [second]
    assert [grant.epoch for receiver in (first, second) for grant in receiver.ledger] == [1, 2]


def test_a_grant_never_exceeds_the_limit_of_a_message() -> None:
    admission, (large,) = pool(2 * MAX_RUNS, 2 * MAX_RUNS)
    admission.allocate(0.0)
    assert max(granted(large)) == MAX_RUNS


def test_blocks_of_draining_grants_are_quarantined_until_they_are_released() -> None:
    admission, (receiver,) = pool(4, 1000)
    admission.allocate(0.0)
    receiver.abort(Aborted("enough"), 0.0)
    admission.update_quarantine(receiver)
    admission.update_quarantine(receiver)
    assert (admission.allocator.used, admission.allocator.quarantined) == (0, 4)
    admission.allocator.check_integrity()
    give_back(admission, receiver)
    assert admission.allocator.available == 4
