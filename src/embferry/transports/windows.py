"""The table of open windows: which epoch may write which block. Every transport rejects writes by it.

The table is an array: ``owner[block]`` is the epoch that may write the block, or :data:`CLOSED`. A byte range is
allowed under an epoch if every block that it touches belongs to that epoch. The ``shm`` transport keeps the array in
shared memory, the others in private memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError, TransportError

from .contract import Piece, Window

CLOSED = 0
MAX_EPOCH = (1 << 64) - 1

FEW = 16  # ranges, up to which plain Python is faster than numpy calls
RANGE_BYTES = 16
MAX_RANGES = 1 << 16
MAX_PAYLOAD = 1 << 46  # bytes: more than any machine's memory, and times MAX_RANGES still below 64 bits

Ranges = npt.NDArray[np.uint64]
"""Byte ranges as an array ``[n, 2]`` of offset and length."""


def as_ranges(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Returns byte ranges as an array.

    Raises:
        OverflowError: A number is negative or exceeds 64 bits.
    """
    return np.array(ranges, dtype=np.uint64).reshape(-1, 2)


def ranges_of(pieces: Sequence[Piece]) -> Ranges:
    """Returns the byte ranges that pieces are written to. Raises OverflowError, as :func:`as_ranges`."""
    return as_ranges([(piece.offset, piece.source.nbytes) for piece in pieces])


def checked_ranges(epoch: int, pieces: Sequence[Piece]) -> Ranges | TransportError:
    """Returns the ranges of a write that a message of a transport can hold, or the error of an impossible write.

    The error is not raised: a raised error that is kept would keep the frames, and with them the source, alive.
    """
    size = sum(piece.source.nbytes for piece in pieces)
    if not 1 <= len(pieces) <= MAX_RANGES or size > MAX_PAYLOAD:
        text = f"a write of {len(pieces)} pieces, {size} bytes; make it 1 to {MAX_RANGES}, {MAX_PAYLOAD} bytes"
        return TransportError(text, retryable=False)
    try:
        if 0 <= epoch <= MAX_EPOCH:
            return ranges_of(pieces)
    except OverflowError:
        pass
    return TransportError("an offset or the epoch of the write is beyond 64 bits", retryable=False)


def parse_ranges(data: bytes | bytearray, payload: int) -> Ranges | None:
    """Decodes up to :data:`MAX_RANGES` ranges, big-endian; None unless their lengths add up to ``payload``."""
    ranges = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)
    lengths = ranges[:, 1]
    # At most MAX_RANGES lengths of at most MAX_PAYLOAD each: the sum cannot wrap.
    adds_up = (lengths <= payload).all() and int(lengths.sum()) == payload
    return ranges if adds_up else None


class BlockRows:
    """Computes which blocks byte ranges touch, from the rows of a region (see ``Region.rows``)."""

    def __init__(self, rows: Sequence[tuple[int, int]], num_blocks: int) -> None:
        table = np.array(rows, dtype=np.int64).reshape(-1, 2)
        self.num_blocks = num_blocks
        self._base, self._row = table[:, 0], table[:, 1]
        self._bases, self._sizes = self._base.tolist(), self._row.tolist()
        self.end = int((self._base + self._row * num_blocks).max())

    def touched(self, ranges: Ranges) -> npt.NDArray[np.intp] | None:
        """Returns the blocks that ``ranges`` touch, ascending; None if one leaves its field. No arithmetic wraps."""
        return self._few(ranges.tolist()) if len(ranges) <= FEW else self._many(ranges)

    def _few(self, ranges: list[tuple[int, int]]) -> npt.NDArray[np.intp] | None:
        found: set[int] = set()
        for offset, length in ranges:
            if offset + length > self.end:
                return None
            if not length:
                continue
            field = bisect_right(self._bases, offset) - 1
            if field < 0:
                return None
            base, row = self._bases[field], self._sizes[field]
            first, last = (offset - base) // row, (offset + length - 1 - base) // row
            if last >= self.num_blocks:
                return None
            found.update(range(first, last + 1))
        return np.array(sorted(found), np.intp)

    def _many(self, ranges: Ranges) -> npt.NDArray[np.intp] | None:
        if (ranges > self.end).any():
            return None
        offset, length = ranges.astype(np.int64).T
        offset, length = offset[length > 0], length[length > 0]
        field = np.searchsorted(self._base, offset, side="right") - 1
        if (field < 0).any():
            return None
        base, row = self._base[field], self._row[field]
        first, last = (offset - base) // row, (offset + length - 1 - base) // row
        if (last >= self.num_blocks).any():
            return None
        starts = np.bincount(first, minlength=self.num_blocks + 1)
        stops = np.bincount(last + 1, minlength=self.num_blocks + 1)
        return np.flatnonzero(np.cumsum(starts - stops))


def allows(owner: npt.NDArray[np.uint64], epoch: int, touched: npt.NDArray[np.intp]) -> bool:
    """Returns whether there is a touched block and every touched block belongs to ``epoch``."""
    if not 1 <= epoch <= MAX_EPOCH or not touched.size:
        return False
    if touched.size > FEW:
        return bool((owner[touched] == np.uint64(epoch)).all())
    owners: list[int] = owner[touched].tolist()
    return owners.count(epoch) == len(owners)


class Windows:
    """The open windows of a region. Thread-safe.

    Args:
        rows: The rows of the region.
        owner: uint64 ``[num_blocks]``, all :data:`CLOSED`; the table itself.

    Attributes:
        version: Grows whenever a window is closed, wholly or in part.
    """

    def __init__(self, rows: BlockRows, owner: npt.NDArray[np.uint64]) -> None:
        self.rows = rows
        self.version = 0
        self._owner = owner
        self._open: dict[int, set[int]] = {}
        self._lock = threading.Lock()

    def admit(self, window: Window) -> None:
        """Opens a window.

        Raises:
            LocalProtocolError: Its epoch or blocks are out of bounds or in use.
        """
        blocks = np.array(window.blocks, dtype=np.int64)
        if not 1 <= window.epoch <= MAX_EPOCH:
            raise LocalProtocolError(f"epoch {window.epoch} cannot be admitted; epochs are 1 to 2**64 - 1")
        if not blocks.size or blocks.min() < 0 or blocks.max() >= self.rows.num_blocks:
            raise LocalProtocolError(f"the window of epoch {window.epoch} has no blocks, or blocks outside the region")
        with self._lock:
            if window.epoch in self._open:
                raise LocalProtocolError(f"epoch {window.epoch} has a window already; every grant needs a new epoch")
            taken = blocks[self._owner[blocks] != CLOSED]
            if taken.size:
                raise LocalProtocolError(
                    f"block {taken[0]} belongs to the open window of epoch {self._owner[taken[0]]}; close that first"
                )
            self._open[window.epoch] = set(window.blocks)
            self._owner[blocks] = window.epoch

    def close_blocks(self, epoch: int, blocks: Sequence[int]) -> None:
        with self._lock:
            window = self._open.get(epoch, set())
            self._shut(epoch, window & set(blocks))

    def revoke(self, epoch: int) -> tuple[int, ...]:
        """Closes the window of ``epoch``. Returns the blocks that were still open, ascending."""
        with self._lock:
            blocks = self._open.get(epoch, set()).copy()
            self._shut(epoch, blocks)
        return tuple(sorted(blocks))

    def close_all(self) -> None:
        """Closes every window for good, and lets go of the table, which may be a mapping."""
        with self._lock:
            self._open.clear()
            self._owner[:] = CLOSED
            self._owner = np.zeros_like(self._owner)
            self.version += 1

    def allows(self, epoch: int, touched: npt.NDArray[np.intp]) -> bool:
        """Returns whether all of these blocks, at least one, may be written under ``epoch`` at this moment."""
        return allows(self._owner, epoch, touched)

    def _shut(self, epoch: int, blocks: set[int]) -> None:
        if not blocks:
            return
        self._owner[list(blocks)] = CLOSED
        self.version += 1
        self._open[epoch] -= blocks
        if not self._open[epoch]:
            del self._open[epoch]
