"""The arithmetic by which processors make grids of pictures: ``smart_resize`` of Qwen2-VL and its successors.

A producer under vLLM tells the numbers of its model; a router computes grids before pictures are encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

KEY = "embferry_pictures"
"""Key of a rule in an item's entry of ``ec_transfer_params``, beside the coordinates."""
MAX_RATIO = 200
"""Longest side by shortest one, beyond which processors refuse a picture."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class GridRule(msgspec.Struct, frozen=True):
    """How the processor of a model makes a grid of a picture.

    Attributes:
        field: The field of the metadata that has the grid.
        patch: Pixels a side of a patch, of which the grid counts the number.
        factor: Pixels a side of a visual token. The sides of the picture become multiples of it.
        min_pixels: The least pixels of the picture after resizing.
        max_pixels: The most.
    """

    field: str
    patch: Count
    factor: Count
    min_pixels: Count
    max_pixels: Count

    def tokens(self, width: int, height: int) -> tuple[int, int] | None:
        """Returns rows and columns of visual tokens; None if the processor refuses the picture."""
        if not width or not height or max(width, height) > MAX_RATIO * min(width, height):
            return None
        rows, columns = (round(side / self.factor) for side in (height, width))
        pixels = rows * columns * self.factor**2
        if pixels > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return _pair(max(1, math.floor(side / shrink / self.factor)) for side in (height, width))
        if pixels < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            return _pair(math.ceil(side * stretch / self.factor) for side in (height, width))
        return rows, columns

    def metadata(self, width: int, height: int) -> dict[str, Any] | None:
        """Returns an item's metadata; None if the processor refuses the picture."""
        found = self.tokens(width, height)
        return None if found is None else {self.field: [1, *(side * self.factor // self.patch for side in found)]}


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    rows, columns = sides
    return rows, columns


def rule_in(entry: dict[str, Any]) -> GridRule | None:
    """Removes the rule from an item's entry, and returns it if it can be read."""
    try:
        return msgspec.convert(entry.pop(KEY, None), GridRule | None)
    except (msgspec.ValidationError, UnicodeEncodeError, RecursionError):
        return None
