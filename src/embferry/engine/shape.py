"""The shape of one picture or video: all the language side has to know about it before its embedding arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["image", "video"]

#: Value of ``mm_token_type_ids`` for the placeholder tokens of each kind; text is 0.
TOKEN_TYPE: dict[Kind, int] = {"image": 1, "video": 2}


@dataclass(frozen=True, slots=True)
class MediaShape:
    """One item of a request, without its pixels.

    Attributes:
        kind: "image" or "video".
        grid: patches in time, height and width, before merging.
        timestamps: seconds of each temporal patch, as the family reckons them; empty where it needs none.
        digest: content digest of the embedding; empty when unknown. Two items of the same shape differ in nothing else.
    """

    kind: Kind
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()
    digest: bytes = b""

    def num_tokens(self, merge: int) -> int:
        """Tokens the language model sees, ``merge × merge`` patches each."""
        t, h, w = self.grid
        return t * (h // merge) * (w // merge)


def merged_positions(grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Time, row and column of every merged patch, counted from the item's own corner.

    Returns:
        int32 ``[tokens, 3]``, in the order of the rows of the embedding.
    """
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in (t, h, w)), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)
