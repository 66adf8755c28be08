"""The receive pool of a language instance: what it costs to have less, and how much is enough."""

from __future__ import annotations

import msgspec


class Pool(msgspec.Struct, frozen=True):
    """Blocks of tokens."""

    blocks: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    def resumes(self, tokens: int, arriving: int) -> int:
        """Returns how often a transfer is resumed.

        It gets what others leave of the pool, and one block at least: the initial transfer fills that, and so does each
        resumed one.

        Args:
            tokens: Of the embedding.
            arriving: Tokens of the transfers that are under way.
        """
        blocks = max(1, self.blocks - -(-arriving // self.block_size))
        return max(0, -(-tokens // (blocks * self.block_size)) - 1)


def enough(tokens: int, block_size: int) -> Pool:
    """Returns the smallest pool that so many tokens fit into."""
    return Pool(max(1, -(-tokens // block_size)), block_size)
