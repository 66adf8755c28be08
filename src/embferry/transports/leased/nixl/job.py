"""One write, cut into requests for the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embferry.protocol.errors import TransportError

from ...contract import Piece
from ...windows import Ranges, ranges_of
from .agent import Descriptors

MAX_DESCRIPTORS = 4096  # in one request: bounds the memory and the time one takes to prepare


class Job:
    """A write and how far it is. The pieces keep the source alive.

    :raises OverflowError: an offset is beyond 64 bits.
    """

    serial = 0
    """The link's number for it; a ticket is the driver's."""

    def __init__(self, ticket: int, epoch: int, pieces: Sequence[Piece]) -> None:
        self.ticket, self.epoch = ticket, epoch
        self.pieces = tuple(pieces)
        self.ranges: Ranges = ranges_of(pieces)
        self.go: bool | None = None
        """The receiver's verdict."""
        self.stopped = False
        """The receiver has closed the window: begin no more of it."""
        # For the writer's thread.
        self.runs: list[tuple[int, int, int]] = []
        self.source: list[tuple[int, int]] = []
        self.slices: Iterator[tuple[Descriptors, Descriptors]] | None = None
        self.exhausted = False
        """Nothing more of it will be posted."""
        self.in_flight = 0
        self.error: TransportError | None = None

    def lay_out(self) -> None:
        """Finds the addresses: ``runs`` are ``(address, offset, length)``, ``source`` is the memory they cover."""
        self.runs = merged_runs(self.pieces)
        self.source = merged_source(self.runs)

    def cut(self, base: int, slice_bytes: int) -> None:
        self.slices = slices(self.runs, base, slice_bytes)


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def merged_runs(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """``(address, offset, length)`` of the pieces that have bytes; neighbours on both sides become one."""
    runs: list[tuple[int, int, int]] = []
    for piece in pieces:
        length = piece.source.nbytes
        if not length:
            continue
        address, offset = address_of(piece.source), piece.offset
        if runs:
            before, at, size = runs[-1]
            if before + size == address and at + size == offset:
                runs[-1] = (before, at, size + length)
                continue
        runs.append((address, offset, length))
    return runs


def merged_source(runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """``(address, length)``, ascending, apart from each other."""
    ranges: list[tuple[int, int]] = []
    for address, _, length in sorted(runs):
        if ranges and address <= sum(ranges[-1]):
            start, size = ranges[-1]
            ranges[-1] = (start, max(size, address + length - start))
        else:
            ranges.append((address, length))
    return ranges


def slices(
    runs: Sequence[tuple[int, int, int]], base: int, slice_bytes: int
) -> Iterator[tuple[Descriptors, Descriptors]]:
    """Source and destination of requests of at most ``slice_bytes``, which together are the runs."""
    chosen: list[tuple[int, int, int]] = []
    room = slice_bytes
    for address, offset, length in runs:
        done = 0
        while done < length:
            part = min(length - done, room)
            chosen.append((address + done, base + offset + done, part))
            done += part
            room -= part
            if room == 0 or len(chosen) == MAX_DESCRIPTORS:
                yield _descriptors(chosen)
                chosen, room = [], slice_bytes
    if chosen:
        yield _descriptors(chosen)


def _descriptors(chosen: list[tuple[int, int, int]]) -> tuple[Descriptors, Descriptors]:
    table = np.array(chosen, np.uint64)
    local, remote = np.zeros_like(table), np.zeros_like(table)  # the third column is the device: host memory
    local[:, 0], remote[:, 0] = table[:, 0], table[:, 1]
    local[:, 1] = remote[:, 1] = table[:, 2]
    return local, remote
