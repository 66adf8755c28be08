"""Marks in blocks that somebody else is to write over: whether a status that names no round can be about this one.

Before blocks are announced, 16 random bytes are put at the start and at the end of each of their rows. A round is over
when none of those is left where tokens should be. That takes no promise from the peer, and beyond repeated statuses it
finds rows that were never written: buffers of another size, a sender that reports what it did not do. It is no
checksum: bytes between the marks are not looked at.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from embferry.memory.buffers import MultimodalDataBuffers

from ..wire.reception import Round

MARK_BYTES = 16
FEWEST_BYTES = 8  # a shorter mark could be what the peer writes
NOT_WRITTEN = -1  # in aux_datas[0]: no length


class Marks:
    """:class:`~embferry.disaggregation.wire.reception.Evidence` of one round.

    :param aux: int32 [num_blocks, 16], beside ``buffers``.
    """

    def __init__(self, buffers: MultimodalDataBuffers, aux: npt.NDArray[np.int32], asked: Round) -> None:
        self._aux, self._blocks = aux, list(asked.blocks)
        self._block_size = buffers.geometry.block_size
        self._mark = np.frombuffer(secrets.token_bytes(MARK_BYTES), np.uint8)
        layout = buffers.geometry.layout
        self._fields = [(buffers.field(field.name), field.token_bytes) for field in layout.fields]
        self._fields = [(rows, size) for rows, size in self._fields if rows.shape[1] >= 2 * FEWEST_BYTES]
        for rows, _ in self._fields:
            length = self._length(rows)
            rows[self._blocks, :length] = self._mark[:length]
            rows[self._blocks, -length:] = self._mark[:length]
        if asked.sent_tokens == 0:
            aux[asked.blocks[0]] = NOT_WRITTEN

    def total_tokens(self) -> int | None:
        total = int(self._aux[self._blocks[0], 0])
        return None if total == NOT_WRITTEN else total

    def written(self, tokens: int) -> bool:
        full, rest = divmod(tokens, self._block_size)
        whole, last = self._blocks[:full], self._blocks[full : full + bool(rest)]
        for rows, size in self._fields:
            length = self._length(rows)
            if self._left(rows, whole, length) or self._left(rows, whole, length, tail=True):
                return False
            if self._left(rows, last, min(length, rest * size)):
                return False
        return True

    def _left(self, rows: npt.NDArray[np.uint8], blocks: list[int], length: int, *, tail: bool = False) -> bool:
        """Whether a mark is left in any of ``blocks``."""
        if length < FEWEST_BYTES:
            return False
        seen = rows[blocks, -length:] if tail else rows[blocks, :length]
        return bool((seen == self._mark[:length]).all(axis=1).any())

    @staticmethod
    def _length(rows: npt.NDArray[np.uint8]) -> int:
        return min(MARK_BYTES, int(rows.shape[1]) // 2)
