"""Managers with several transports: the choice of one, and the change to the next when it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from embferry import Checksums, GatherSink, ReceiveManager, SendManager, wait
from embferry.protocol.errors import TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transfer import writer
from embferry.transports.contract import Piece, Region, Transport, Written
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport

from .conftest import LAYOUT, SECONDS, Pair, embedding, same

pytestmark = pytest.mark.usefixtures("checksums")

TOKENS = 400
SMALL_CHUNKS = {"chunk_bytes": 16 * LAYOUT.token_bytes, "writes_in_flight": 2}


class Unreliable(InMemoryTransport):
    """A transport whose writes fail after the first few; the error is retryable."""

    name = "unreliable"
    carries = 5
    retryable = True

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        self.carries -= 1
        if self.carries >= 0:
            super().write(handle, epoch, blocks, pieces, ticket)
        else:
            self._outbox.post(Written(ticket, TransportError("worn out", retryable=self.retryable)))


class Broken(Unreliable):
    """A transport whose writes fail after the first few; the error is not retryable."""

    name = "broken"
    retryable = False


class Damaging(InMemoryTransport):
    """A transport that flips a bit of its first write."""

    name = "damaging"
    damaged = False

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        if not self.damaged:
            self.damaged = True
            bad = np.frombuffer(pieces[0].source, np.uint8).copy()
            bad[3] ^= 1
            pieces = [Piece(bad.data, pieces[0].offset), *pieces[1:]]
        super().write(handle, epoch, blocks, pieces, ticket)


class OfAnotherHost(ShmTransport):
    """Shared memory whose handle is that of a receiver on another host."""

    def register(self, region: Region) -> bytes:
        handle = msgspec.msgpack.decode(super().register(region))
        handle[0] = "boot id of another host"
        return msgspec.msgpack.encode(handle)


@contextmanager
def joined(
    receiving: Sequence[Transport], writing: Sequence[Transport], num_blocks: int = 8, **settings: float
) -> Iterator[Pair]:
    numbers = TransferSettings(**settings)
    receive = ReceiveManager(Geometry(LAYOUT, num_blocks, 16), receiving, settings=numbers)
    pair = Pair(receive, SendManager(LAYOUT, writing, settings=numbers), type(writing[0]))
    yield pair
    pair.sending.close()
    pair.receiving.allocator.check_integrity()
    pair.receiving.close()


@pytest.mark.parametrize("first", [Unreliable, Broken])
@pytest.mark.parametrize("second", [InMemoryTransport, TcpTransport, ShmTransport])
def test_a_transfer_resumes_over_the_next_transport(first: type[Unreliable], second: type[Transport]) -> None:
    rows = embedding(TOKENS)
    with joined([second(), first()], [first(), second()], **SMALL_CHUNKS) as pair:
        receiver = pair.receiver()
        receiver.init()
        sender = pair.sender(receiver.room, rows)
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)
        assert receiver.machine.transport == second.name
        (destination,) = sender.machine.destinations.values()
        assert [transport.name for transport in destination.transports.given_up] == [first.name]
        # only the failed chunks were sent again
        assert TOKENS * LAYOUT.token_bytes < sender.sent_bytes <= (TOKENS + 16 * 4) * LAYOUT.token_bytes


def test_shared_memory_of_another_host_is_not_used() -> None:
    rows = embedding(TOKENS)
    with joined([OfAnotherHost(), TcpTransport()], [ShmTransport(), TcpTransport()]) as pair:
        receiver = pair.receiver()
        receiver.init()
        pair.sender(receiver.room, rows)
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)
        assert receiver.machine.transport == "tcp"


def test_without_another_transport_the_transfer_fails_with_the_transport_s_error() -> None:
    with joined([Broken()], [Broken()], **SMALL_CHUNKS) as pair:
        receiver = pair.receiver()
        receiver.init()
        pair.sender(receiver.room, embedding(TOKENS))
        with pytest.raises(TransportError, match="worn out"):
            wait(receiver, SECONDS)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_a_damaged_chunk_is_sent_again(in_place: bool) -> None:
    rows = embedding(100)
    with joined([Damaging()], [Damaging()], **SMALL_CHUNKS) as pair:
        receiver = pair.receiver(sink=GatherSink(in_place=in_place))
        receiver.init()
        sender = pair.sender(receiver.room, rows)
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)
        assert sender.sent_bytes == 116 * LAYOUT.token_bytes
        receiver.clear()


def test_a_receiver_that_does_not_verify_accepts_damaged_chunks() -> None:
    rows = embedding(100)
    with joined([Damaging()], [Damaging()], verify=False, **SMALL_CHUNKS) as pair:
        receiver = pair.receiver()
        receiver.init()
        sender = pair.sender(receiver.room, rows)
        wait(receiver, SECONDS)
        arrived = receiver.arrays()
        differ = {name: np.flatnonzero(arrived[name] != rows[name]).tolist() for name in rows}
        assert differ == {"input_embeddings": [3], "deepstack_embeddings": [], "fill_ids": [], "mrope_positions": []}
        assert sender.sent_bytes == 100 * LAYOUT.token_bytes


def test_checksums_taken_ahead_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = embedding(TOKENS)
    ahead = Checksums(LAYOUT, int(SMALL_CHUNKS["chunk_bytes"]))
    for produced in (0, 7, 33, 150, TOKENS):
        ahead.take(rows, produced)
    monkeypatch.setattr(writer, "chunk_checksum", None)  # a call would end the transfer
    monkeypatch.setattr(writer, "checksum_steps", None)
    with joined([InMemoryTransport()], [InMemoryTransport()], num_blocks=32, **SMALL_CHUNKS) as pair:
        receiver = pair.receiver()
        receiver.init()
        sender = pair.sending.open(receiver.room)
        sender.init(TOKENS, b"digest")
        sender.send_embedding(rows, checksums=ahead)
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)


def test_checksums_of_other_chunk_boundaries_are_computed_during_the_transfer() -> None:
    rows = embedding(TOKENS)
    ahead = Checksums(LAYOUT)  # of larger chunks than this pool grants
    ahead.take(rows, TOKENS)
    with joined([InMemoryTransport()], [InMemoryTransport()], **SMALL_CHUNKS) as pair:
        receiver = pair.receiver()
        receiver.init()
        sender = pair.sending.open(receiver.room)
        sender.init(TOKENS, b"digest")
        sender.send_embedding(rows, checksums=ahead)
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)
