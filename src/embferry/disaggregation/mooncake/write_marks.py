"""Random marks in blocks that a peer will overwrite, to tell whether a status is about the current round.

A status names no round, so a repeated one looks like the next. Before blocks are announced, 16 random bytes are put at
the start and at the end of each of their rows. A round is over when no mark is left where tokens should be. This needs
no promise of the peer. Besides repeated statuses it finds rows that were never written: buffers of another size, or a
sender that reports what it has not done. It is not a checksum: the bytes between the marks are not compared.
"""

from __future__ import annotations

import secrets

import numpy as np

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.transfer.fields import Array

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
        self._ends: list[tuple[Array, Array, int]] = []  # head and tail of each row of a field, and its bytes a token
        for field in buffers.geometry.layout.fields:
            rows = buffers.field(field.name)
            length = min(MARK_BYTES, rows.shape[1] // 2)
            if length >= FEWEST_BYTES:
                heads, tails = rows[:, :length], rows[:, -length:]
                heads[self._blocks] = tails[self._blocks] = self._mark[:length]
                self._ends.append((heads, tails, field.token_bytes))
        if asked.sent_tokens == 0:
            self._aux[asked.blocks[0]] = NOT_WRITTEN

    def total_tokens(self) -> int | None:
        total = int(self._aux[self._blocks[0], 0])
        return None if total == NOT_WRITTEN else total

    def written(self, tokens: int) -> bool:
        full, rest = divmod(tokens, self._block_size)
        whole, last = self._blocks[:full], self._blocks[full : full + bool(rest)]
        return not any(
            self._marked(heads[whole]) or self._marked(tails[whole]) or self._marked(heads[last, : rest * size])
            for heads, tails, size in self._ends
        )

    def _marked(self, seen: Array) -> bool:
        """Returns whether any of the rows of ``seen`` is the start of the mark."""
        count = seen.shape[1]
        return count >= FEWEST_BYTES and bool((seen == self._mark[:count]).all(axis=1).any())
