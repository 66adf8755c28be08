"""A receiver and a sender joined by a transport, and ways to wait for their events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from embferry.memory.buffers import MultimodalDataBuffers, source_pieces
from embferry.protocol.errors import TransportError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transports.contract import Event, LinkLost, Piece, Revoked, Transport, Window, Written

__all__ = [
    "CANARY",
    "DEADLINE_S",
    "LARGE",
    "LAYOUT",
    "SMALL",
    "Endpoint",
    "TransportPair",
    "block_ranges",
    "embedding",
    "eventually",
]

DEADLINE_S = 60.0
"""Longest wait for an event. Far longer than any takes, so that a busy machine does not fail a test."""

CANARY = 0xA5
"""Value of every byte of a region that nothing has been written to."""

LAYOUT = Layout(
    (
        Field("input_embeddings", "bfloat16", 24),
        Field("fill_ids", "int32", 1),
        Field("mrope_positions", "int32", 3),
        Field("deepstack_embeddings", "bfloat16", 56),
    )
)
SMALL = Geometry(LAYOUT, num_blocks=16, block_size=5)
LARGE = Geometry(Layout((Field("input_embeddings", "bfloat16", 4096),)), num_blocks=64, block_size=64)  # 32 MiB

E = TypeVar("E", Written, LinkLost)


def embedding(layout: Layout, tokens: int, seed: int = 0) -> dict[str, npt.NDArray[np.uint8]]:
    """Returns random bytes for every field: uint8 ``[tokens, token_bytes]``."""
    rng = np.random.default_rng(seed)
    return {f.name: rng.integers(0, 256, (tokens, f.token_bytes), np.uint8) for f in layout.fields}


def block_ranges(geometry: Geometry, blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns the (offset, length) byte ranges that ``blocks`` occupy in all fields."""
    fields = zip(geometry.layout.fields, geometry.field_offsets, strict=True)
    rows = [(base, field.token_bytes * geometry.block_size) for field, base in fields]
    return [(base + block * row, row) for base, row in rows for block in blocks]


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for a condition that no event reports, such as a byte of the region."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not come true within {DEADLINE_S} s"
        time.sleep(0.0002)


class Endpoint:
    """A transport and the events it has reported."""

    def __init__(self, make: Callable[[Callable[[], None]], Transport]) -> None:
        self._woken = threading.Event()
        self.transport = make(self._woken.set)
        self.events: list[Event] = []

    def poll(self) -> None:
        self.events += self.transport.poll()

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls whenever the transport calls ``wake``, until ``condition`` holds."""
        deadline = time.monotonic() + DEADLINE_S
        self.poll()
        while not condition():
            if not self._woken.wait(deadline - time.monotonic()):
                pytest.fail(f"wake was not called within {DEADLINE_S} s; events so far: {self.events}")
            self._woken.clear()
            self.poll()

    def written(self, ticket: int) -> TransportError | None:
        """Waits for the write ``ticket`` and returns its error."""
        return self._only(Written, lambda event: event.ticket == ticket).error

    def revoked(self, epoch: int, times: int = 1) -> None:
        """Waits for ``Revoked(epoch)`` and checks that it is reported ``times`` times."""
        self.until(lambda: self.events.count(Revoked(epoch)) >= times)
        assert self.events.count(Revoked(epoch)) == times

    def lost(self) -> LinkLost:
        """Waits for the only ``LinkLost`` and returns it."""
        return self._only(LinkLost, lambda event: True)

    def _only(self, kind: type[E], matches: Callable[[E], bool]) -> E:
        def found() -> list[E]:
            return [event for event in self.events if isinstance(event, kind) and matches(event)]

        self.until(lambda: bool(found()))
        reported = found()
        assert len(reported) == 1, f"reported {len(reported)} times: {reported}"
        return reported[0]


class TransportPair:
    """A receiver whose region is full of canary bytes, and a sender connected to it.

    Args:
        make: Makes a transport; called with its ``wake``.
        geometry: The geometry of the region.
        shared: Whether the region is memory that other processes can map.
    """

    def __init__(
        self, make: Callable[[Callable[[], None]], Transport], geometry: Geometry = SMALL, *, shared: bool = True
    ) -> None:
        self.geometry = geometry
        self.region = MultimodalDataBuffers(geometry, shared=shared)
        self.bytes = np.frombuffer(self.region.view, np.uint8)
        self.bytes[:] = CANARY
        self.receiver, self.sender = Endpoint(make), Endpoint(make)
        self.handle = self.receiver.transport.register(self.region)
        self.sender.transport.connect(self.handle)
        self.receiver.transport.connect_to_sender(self.sender.transport.address)
        self._tickets = iter(range(1, 1 << 30))

    def close(self) -> None:
        self.sender.transport.close()
        self.receiver.transport.close()
        self.bytes = np.zeros(0, np.uint8)
        self.region.close()

    def admit(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self.receiver.transport.admit(Window(epoch, blocks))

    def start(self, epoch: int, blocks: tuple[int, ...], pieces: list[Piece]) -> int:
        """Starts a write and returns its ticket."""
        ticket = next(self._tickets)
        self.sender.transport.write(self.handle, epoch, blocks, pieces, ticket)
        return ticket

    def start_several(self, count: int) -> list[int]:
        """Admits all blocks under epoch 1, starts ``count`` writes that each fill them, and returns their tickets."""
        blocks = tuple(range(self.geometry.num_blocks))
        self.admit(1, blocks)
        pieces = self.fill(blocks)
        return [self.start(1, blocks, pieces) for _ in range(count)]

    def write(self, epoch: int, blocks: tuple[int, ...], pieces: list[Piece]) -> TransportError | None:
        """Writes, waits for the end and returns the error."""
        return self.sender.written(self.start(epoch, blocks, pieces))

    def lands(self, epoch: int, blocks: tuple[int, ...], seed: int = 0) -> list[Piece]:
        """Fills ``blocks``, checks that the write succeeds, and returns its pieces."""
        pieces = self.fill(blocks, seed)
        assert self.write(epoch, blocks, pieces) is None
        return pieces

    def fill(self, blocks: tuple[int, ...], seed: int = 0) -> list[Piece]:
        """Returns pieces that fill ``blocks`` with random bytes."""
        tokens = len(blocks) * self.geometry.block_size
        return source_pieces(self.geometry, embedding(self.geometry.layout, tokens, seed), 0, tokens, blocks, 0)

    def expect(self, *pieces: list[Piece]) -> None:
        """Checks that the region holds these pieces, later ones over earlier ones, and canary bytes elsewhere."""
        expected = np.full_like(self.bytes, CANARY)
        for piece in (p for write in pieces for p in write):
            expected[piece.offset : piece.offset + piece.source.nbytes] = np.frombuffer(piece.source, np.uint8)
        wrong = np.flatnonzero(expected != self.bytes)
        assert not wrong.size, f"{wrong.size} bytes differ, the first at {wrong[0]}"

    def expect_refused(self, error: TransportError | None) -> None:
        """Checks that ``error`` refuses a write for good."""
        assert isinstance(error, TransportError)
        assert not error.retryable, f"the same write would be refused again: {error}"

    def expect_retryable(self, error: TransportError | None) -> None:
        """Checks that ``error`` says that the write may succeed later."""
        assert isinstance(error, TransportError)
        assert error.retryable
