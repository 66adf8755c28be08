"""The byte ranges of a write, and the blocks that they touch: two ways to compute them, which must agree."""

from __future__ import annotations

from random import Random

from embferry.transports.windows import RANGE_BYTES, BlockRows, parse_ranges

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Number, Tree, packed

ROWS = BlockRows(((64, 24), (512, 8), (1 << 20, 4096)), 8)


class RefusedRangesError(Exception):
    """The ranges do not add up, or leave their field."""


class ByteRanges(Target):
    documented = (RefusedRangesError,)
    inputs = 3000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        ranges = []
        for _ in range(chance.choice((1, 2, 20))):
            base, size = chance.choice(((64, 24), (512, 8), (1 << 20, 4096)))
            start = chance.randrange(8 * size)
            ranges.append([Number(base + start, 8), Number(chance.randrange(8 * size - start + 1), 8)])
        return [Number(sum(length.value for _, length in ranges), 8), ranges]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        data = b"".join(pieces)
        payload, encoded = int.from_bytes(data[:8], "big"), data[8:]
        ranges = parse_ranges(encoded[: len(encoded) // RANGE_BYTES * RANGE_BYTES], payload)
        if ranges is None:
            raise RefusedRangesError("the lengths do not add up")
        few, many = ROWS._few(ranges.tolist()), ROWS._many(ranges)
        assert (few is None) == (many is None), "one way refuses what the other accepts"
        if few is None or many is None:
            raise RefusedRangesError("a range leaves its field")
        assert few.tolist() == many.tolist(), "the two ways find other blocks"
