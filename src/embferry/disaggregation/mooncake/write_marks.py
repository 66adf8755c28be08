"""Random marks in blocks that a peer will overwrite, to tell whether a status is about the current round.

A status names no round, so a repeated one looks like the next. Before blocks are announced, 16 random bytes are put at
the start and at the end of each of their rows. A round is over when no mark is left where tokens should be. This needs
no promise of the peer. Besides repeated statuses it finds rows that were never written: buffers of another size, or a
sender that reports what it has not done. It is not a checksum: the bytes between the marks are not compared.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from embferry.memory.buffers import MultimodalDataBuffers

from ..wire.receiver_room import Round

MARK_BYTES = 16
FEWEST_BYTES = 8  # the bytes that a peer writes could equal a shorter mark by chance
NOT_WRITTEN = -1  # in aux_datas[0], where no length is negative


class WriteMarks:
    """The :class:`~embferry.disaggregation.wire.receiver_room.Evidence` of a round, whose blocks are marked at once."""

    def __init__(self, buffers: MultimodalDataBuffers, asked: Round) -> None:
        self._aux, self._blocks = buffers.aux_datas, list(asked.blocks)
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
            self._aux[asked.blocks[0]] = NOT_WRITTEN

    def total_tokens(self) -> int | None:
        total = int(self._aux[self._blocks[0], 0])
        return None if total == NOT_WRITTEN else total

    def written(self, tokens: int) -> bool:
        full, rest = divmod(tokens, self._block_size)
        whole, last = self._blocks[:full], self._blocks[full : full + bool(rest)]
        for rows, size in self._fields:
            length = self._length(rows)
            if self._marked(rows, whole, length) or self._marked(rows, whole, length, tail=True):
                return False
            if self._marked(rows, last, min(length, rest * size)):
                return False
        return True

    def _marked(self, rows: npt.NDArray[np.uint8], blocks: list[int], length: int, *, tail: bool = False) -> bool:
        """Returns whether a mark is left at the head, or at the tail, of any of ``blocks``."""
        if length < FEWEST_BYTES:
            return False
        seen = rows[blocks, -length:] if tail else rows[blocks, :length]
        return bool((seen == self._mark[:length]).all(axis=1).any())

    @staticmethod
    def _length(rows: npt.NDArray[np.uint8]) -> int:
        return min(MARK_BYTES, int(rows.shape[1]) // 2)
