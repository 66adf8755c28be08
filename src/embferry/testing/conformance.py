"""The suite that every transport passes.

Pytest runs it on a subclass that makes the transport::

    import pytest
    from embferry.testing.conformance import TransportConformance

    class TestMine(TransportConformance):
        def make_transport(self, wake):
            return MyTransport(wake)

The suite polls only after ``wake`` was called: a transport that does not call it fails at a deadline.
"""

from __future__ import annotations

import gc
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from embferry.memory.buffers import checksum, source_pieces
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.transports.contract import LinkLost, Piece, Revoked, Transport, Written

from .pair import CANARY, LARGE, LAYOUT, SMALL, TransportPair, embedding, eventually

__all__ = ["TransportConformance"]


class TransportConformance(ABC):
    """Tests of the contract of a transport. Subclasses override :meth:`make_transport`.

    Attributes:
        shared_region: Whether the region is memory that can be mapped a second time; False for private memory.
    """

    shared_region: ClassVar[bool] = True

    @abstractmethod
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        """Returns a new transport, to be used as either side."""

    @pytest.fixture
    def pair(self) -> Iterator[TransportPair]:
        pair = TransportPair(self.make_transport, shared=self.shared_region)
        yield pair
        pair.close()

    @pytest.fixture
    def large(self) -> Iterator[TransportPair]:
        pair = TransportPair(self.make_transport, LARGE, shared=self.shared_region)
        yield pair
        pair.close()

    # Where bytes land

    @pytest.mark.parametrize(("skip", "tokens"), [(0, 1), (0, 5), (4, 2), (3, 17), (0, 20), (19, 1)])
    @pytest.mark.parametrize("blocks", [(4, 5, 6, 7), (9, 2, 3, 14), (15, 0, 8, 1)])
    def test_written_bytes_land_in_the_granted_blocks_and_nowhere_else(
        self, pair: TransportPair, blocks: tuple[int, ...], skip: int, tokens: int
    ) -> None:
        source = embedding(LAYOUT, 40)
        pieces = source_pieces(SMALL, source, 7, tokens, blocks, skip)
        pair.admit(1, blocks)
        assert pair.write(1, blocks, pieces) is None
        pair.expect(pieces)
        arrived = pair.region.chunk(blocks, skip, tokens)
        assert checksum(view for _, view in arrived) == checksum(piece.source for piece in pieces)
        gathered = {name: np.zeros_like(array) for name, array in source.items()}
        pair.region.gather_into(blocks, skip, tokens, gathered, 7)
        for name, array in source.items():
            assert np.array_equal(gathered[name][7 : 7 + tokens], array[7 : 7 + tokens])

    def test_several_writes_fill_one_window(self, pair: TransportPair) -> None:
        source, blocks = embedding(LAYOUT, 15), (3, 8, 9)
        pair.admit(1, blocks)
        parts = [source_pieces(SMALL, source, at, 3, blocks, at) for at in (6, 0, 12, 3, 9)]
        for part in parts:
            assert pair.write(1, blocks, part) is None
        pair.expect(*parts)

    def test_a_read_only_source_is_written(self, pair: TransportPair) -> None:
        pieces = [Piece(memoryview(bytes(range(48))), 0)]
        pair.admit(1, (0,))
        assert pair.write(1, (0,), pieces) is None
        pair.expect(pieces)

    def test_a_large_write_lands(self, large: TransportPair) -> None:
        blocks = (*range(63, 31, -1), *range(31))
        large.admit(1, blocks)
        large.expect(large.lands(1, blocks))

    def test_concurrent_writes_are_each_reported_once(self, pair: TransportPair) -> None:
        writes = []
        for block in range(16):
            pair.admit(block + 1, (block,))
            source = embedding(LAYOUT, 5, seed=block)
            writes += [(block, source_pieces(SMALL, source, token, 1, (block,), token)) for token in range(5)]
        tickets = [pair.start(block + 1, (block,), pieces) for block, pieces in writes]
        refused = [pair.start(99, (block,), pieces) for block, pieces in writes]
        pair.sender.until(lambda: len(pair.sender.events) >= len(tickets) + len(refused))
        errors = {e.ticket: e.error for e in pair.sender.events if isinstance(e, Written)}
        assert sorted(errors) == sorted(tickets + refused)
        assert all(errors[ticket] is None for ticket in tickets)
        for ticket in refused:
            pair.expect_refused(errors[ticket])
        pair.expect(*[pieces for _, pieces in writes])
        assert len(pair.sender.events) == len(tickets) + len(refused)

    # Refusals

    def test_a_write_without_a_window_is_refused(self, pair: TransportPair) -> None:
        pair.expect_refused(pair.write(1, (0,), pair.fill((0,))))
        pair.expect()

    @pytest.mark.parametrize("epoch", [0, 2, 1 << 63, (1 << 64) - 1, 1 << 64, -1])
    def test_a_write_under_another_epoch_is_refused(self, pair: TransportPair, epoch: int) -> None:
        pair.admit(1, (0, 1))
        pair.expect_refused(pair.write(epoch, (0, 1), pair.fill((0, 1))))
        pair.expect()

    def test_a_write_partly_outside_its_window_is_refused_whole(self, pair: TransportPair) -> None:
        pair.admit(1, (2, 3))
        pair.admit(2, (4,))
        size = pair.bytes.size
        row = LAYOUT.fields[0].token_bytes * SMALL.block_size
        inside = pair.fill((2, 3))
        ranges = [(row, row + 1), (2 * row - 1, 2), (4 * row - 1, 2), (size - 1, 2), (size, 1), (2 * row, size)]
        for offset, length in ranges:
            outside = Piece(memoryview(bytes(length)), offset)
            pair.expect_refused(pair.write(1, (2, 3), [*inside, outside]))
        pair.expect_refused(pair.write(1, (2, 3), [*inside, Piece(memoryview(b"xy"), (1 << 64) - 1)]))
        pair.expect()

    def test_a_write_with_one_block_outside_its_window_is_refused(self, pair: TransportPair) -> None:
        pair.admit(1, (5, 6, 8))
        pair.expect_refused(pair.write(1, (5, 6, 7, 8), pair.fill((5, 6, 7, 8))))
        pair.expect()

    def test_invalid_and_overlapping_windows_are_rejected(self, pair: TransportPair) -> None:
        pair.admit(1, (2, 3))
        overlapping = [(2, (3,)), (2, (1, 2)), (1, (5,))]
        for epoch, blocks in [*overlapping, (0, (5,)), (1 << 64, (5,)), (2, ()), (2, (16,)), (2, (-1,))]:
            with pytest.raises(LocalProtocolError):
                pair.admit(epoch, blocks)
        pair.admit(2, (5,))
        pieces = pair.fill((2, 3, 5))
        pair.expect_refused(pair.write(2, (2, 3, 5), pieces))
        pair.expect()

    def test_a_second_region_is_rejected(self, pair: TransportPair) -> None:
        with pytest.raises(LocalProtocolError):
            pair.receiver.transport.register(pair.region)

    # Closing and revoking windows

    def test_closed_blocks_refuse_writes_and_can_be_admitted_under_another_epoch(self, pair: TransportPair) -> None:
        pair.admit(1, (0, 1, 2))
        pair.receiver.transport.close_blocks(1, (1, 7))
        pair.receiver.transport.close_blocks(9, (0,))
        pair.expect_refused(pair.write(1, (0, 1), pair.fill((0, 1))))
        pair.admit(2, (1,))
        pair.expect_refused(pair.write(1, (1,), pair.fill((1,))))
        pair.expect()
        pair.expect(pair.lands(1, (0, 2), seed=1), pair.lands(2, (1,), seed=2))

    def test_a_window_ends_when_its_last_block_is_closed(self, pair: TransportPair) -> None:
        pair.admit(1, (0, 1))
        pair.receiver.transport.close_blocks(1, (1,))
        pair.receiver.transport.close_blocks(1, (0,))
        pair.admit(1, (4,))
        pair.expect(pair.lands(1, (4,)))

    def test_a_revoked_window_refuses_writes(self, pair: TransportPair) -> None:
        pair.admit(1, (0, 1))
        pair.admit(2, (2,))
        pair.receiver.transport.revoke(1)
        pair.receiver.revoked(1)
        pair.expect_refused(pair.write(1, (0,), pair.fill((0,))))
        pair.expect()
        pair.admit(3, (1, 0))
        pieces = pair.fill((0, 1, 2))
        pair.expect_refused(pair.write(3, (0, 1, 2), pieces))
        pair.expect()

    def test_every_revocation_is_reported_once(self, pair: TransportPair) -> None:
        pair.receiver.transport.revoke(77)
        pair.receiver.revoked(77)
        pair.admit(1, (0,))
        pair.receiver.transport.revoke(1)
        pair.receiver.transport.revoke(1)
        pair.receiver.revoked(1, times=2)
        pair.receiver.transport.close_blocks(1, (0,))
        pair.receiver.poll()
        assert pair.receiver.events == [Revoked(77), Revoked(1), Revoked(1)]

    def test_no_byte_changes_after_revoked(self, large: TransportPair) -> None:
        """Writes race a revocation. The region must stay as it is when ``Revoked`` is reported."""
        blocks = tuple(reversed(range(64)))  # many pieces, the end of the region first
        pieces = large.fill(blocks)
        for epoch in range(1, 6):
            large.bytes[:] = CANARY
            large.admit(epoch, blocks)
            tickets = [large.start(epoch, blocks, pieces) for _ in range(2)]
            if epoch % 2:  # revoke after the first byte has landed
                eventually(lambda: bool((large.bytes[-1 << 19 :] != CANARY).any()))
            large.receiver.transport.revoke(epoch)
            large.receiver.revoked(epoch)
            large.admit(epoch + 100, blocks)  # the blocks belong to another transfer now
            large.bytes[:] = CANARY
            errors = [large.sender.written(ticket) for ticket in tickets]
            large.expect()
            assert all(error is None or not error.retryable for error in errors)
            large.receiver.transport.revoke(epoch + 100)
            large.receiver.revoked(epoch + 100)

    # Handles and addresses from the wire

    def test_malformed_handles_are_rejected_at_once(self, pair: TransportPair) -> None:
        rng = np.random.default_rng(1)
        good = pair.handle
        bad: list[object] = [b"", b"\x00", b"\xc1", None, "handle", good + b"\x00", b"x" * 100_000]
        bad += [msgspec.msgpack.encode(7), msgspec.msgpack.encode([]), msgspec.msgpack.encode({"a": 1}), b"\x91" * 1000]
        bad += [good[:cut] for cut in range(1, len(good))]
        bad += [rng.bytes(int(size)) for size in rng.integers(1, 200, 50)]
        for handle in bad:
            with pytest.raises(TransportError) as caught:
                pair.sender.transport.connect(handle)  # type: ignore[arg-type]  # wrong types are among the cases
            assert not caught.value.retryable
        assert len(good) <= 1024

    def test_malformed_addresses_are_rejected(self, pair: TransportPair) -> None:
        good = pair.sender.transport.address
        assert len(good) <= 1024
        rng = np.random.default_rng(9)
        bad = [good[: len(good) // 2], b"\xff" + good, b"x" * 100_000, *(rng.bytes(n) for n in (1, 30, 300))]
        for address in bad if good else []:  # a transport without addresses ignores them
            with pytest.raises(TransportError) as caught:
                pair.receiver.transport.connect_to_sender(address)
            assert not caught.value.retryable
        pair.receiver.transport.connect_to_sender(good)
        pair.admit(1, (0,))
        pair.lands(1, (0,))

    def test_connecting_twice_makes_one_connection(self, pair: TransportPair) -> None:
        pair.sender.transport.connect(pair.handle)
        pair.admit(1, (0,))
        pair.expect(pair.lands(1, (0,)))

    # The end of a connection

    def test_a_write_without_a_connection_ends_in_a_retryable_error(self, pair: TransportPair) -> None:
        pair.sender.transport.disconnect(b"unknown")
        pair.sender.transport.disconnect(pair.handle)
        pair.admit(1, (0,))
        pair.expect_retryable(pair.write(1, (0,), pair.fill((0,))))
        pair.expect()
        pair.sender.transport.connect(pair.handle)
        pair.receiver.transport.connect_to_sender(pair.sender.transport.address)
        pair.expect(pair.lands(1, (0,)))

    def test_disconnecting_ends_writes_in_flight(self, large: TransportPair) -> None:
        tickets = large.start_several(3)
        large.sender.transport.disconnect(large.handle)
        for ticket in tickets:
            error = large.sender.written(ticket)
            assert error is None or error.retryable
        large.sender.poll()
        assert LinkLost not in map(type, large.sender.events), "reported to the side that disconnected"

    def test_the_sender_detects_a_closed_receiver(self, pair: TransportPair) -> None:
        pair.admit(1, (0,))
        pair.lands(1, (0,))
        pair.receiver.transport.close()
        lost = pair.sender.lost()
        assert lost.handle == pair.handle
        assert lost.error.retryable
        pair.expect_retryable(pair.write(1, (0,), pair.fill((0,))))

    def test_writes_in_flight_end_before_the_link_when_the_receiver_closes(self, large: TransportPair) -> None:
        tickets = large.start_several(4)
        large.receiver.transport.close()
        large.bytes[:] = CANARY
        for ticket in tickets:
            large.sender.written(ticket)
        large.sender.lost()
        assert [type(event) for event in large.sender.events] == [Written] * 4 + [LinkLost]
        large.expect()

    def test_one_sender_writes_to_two_receivers(self, pair: TransportPair) -> None:
        other = TransportPair(self.make_transport, shared=self.shared_region)
        try:
            pair.sender.transport.connect(other.handle)
            other.receiver.transport.connect_to_sender(pair.sender.transport.address)
            for region, blocks in ((pair, (1,)), (other, (2,))):
                region.admit(1, blocks)
                pieces = region.fill(blocks)
                pair.sender.transport.write(region.handle, 1, blocks, pieces, 1000 + blocks[0])
                assert pair.sender.written(1000 + blocks[0]) is None
                region.expect(pieces)
            other.receiver.transport.close()
            assert pair.sender.lost().handle == other.handle
            pair.expect(pair.lands(1, (1,), seed=5))
        finally:
            other.close()

    # Closing

    def test_closing_ends_writes_in_flight_and_is_idempotent(self, large: TransportPair) -> None:
        tickets = large.start_several(2)
        large.sender.transport.close()
        large.sender.transport.close()
        large.sender.poll()
        assert sorted(e.ticket for e in large.sender.events if isinstance(e, Written)) == tickets
        large.receiver.transport.close()
        large.receiver.transport.close()

    def test_an_unused_transport_can_be_closed(self) -> None:
        self.make_transport(lambda: None).close()

    def test_nothing_of_a_receiver_remains_when_its_link_has_ended(self, pair: TransportPair) -> None:
        pair.admit(1, (0,))
        pair.lands(1, (0,))
        with _nothing_remains():
            for number, disconnect in enumerate((False, True, False, True)):
                other = TransportPair(self.make_transport, shared=self.shared_region)
                pair.sender.transport.connect(other.handle)
                other.receiver.transport.connect_to_sender(pair.sender.transport.address)
                other.admit(1, (0,))
                pair.sender.transport.write(other.handle, 1, (0,), other.fill((0,)), 1000 + number)
                assert pair.sender.written(1000 + number) is None
                if disconnect:
                    pair.sender.transport.disconnect(other.handle)
                other.close()
                if not disconnect:
                    assert pair.sender.lost().handle == other.handle
                    pair.sender.events.clear()
                del other

    def test_nothing_remains_after_closing(self) -> None:
        with _nothing_remains():
            for epoch in range(1, 4):
                pair = TransportPair(self.make_transport, shared=self.shared_region)
                pair.admit(epoch, (0, 1))
                assert pair.write(epoch, (0, 1), pair.fill((0, 1))) is None
                pair.expect_refused(pair.write(epoch + 1, (0,), pair.fill((0,))))
                pair.receiver.transport.revoke(epoch)
                pair.receiver.revoked(epoch)
                if epoch == 2:
                    pair.receiver.transport.close()
                    pair.sender.lost()
                pair.close()
                del pair


@contextmanager
def _nothing_remains() -> Iterator[None]:
    """Checks that every thread, descriptor and mapping of shared memory that is made within ends within.

    The garbage collector is off meanwhile: it may take hours until it comes in a process with little to do.
    """

    def remains() -> tuple[int, int, set[threading.Thread]]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:"), set(threading.enumerate())

    gc.collect()  # what earlier tests have left
    before = remains()
    gc.disable()
    try:
        yield
        eventually(lambda: remains() == before)
    finally:
        gc.enable()
