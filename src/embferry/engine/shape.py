"""The shape of a picture or video: all that the language side needs before the embedding arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["image", "video"]

#: Values of ``mm_token_type_ids`` for placeholder tokens; text is 0.
TOKEN_TYPE: dict[Kind, int] = {"image": 1, "video": 2}


@dataclass(frozen=True, slots=True)
class MediaShape:
    """A media item of a request, without its pixels.

    Attributes:
        kind: "image" or "video".
        grid: Patches in time, height and width, before merging.
        timestamps: Seconds of each temporal patch, by the family's rule; empty if the family does not use them.
        digest: Content digest of the embedding; empty if unknown.
    """

    kind: Kind
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()
    digest: bytes = b""

    def num_tokens(self, merge: int) -> int:
        """Returns the number of visual tokens, of ``merge × merge`` patches each."""
        t, h, w = self.grid
        return t * (h // merge) * (w // merge)


def merged_positions(grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Returns time, row and column of every merged patch within the item.

    Returns:
        int32 ``[tokens, 3]``, in the order of the tokens of the embedding.
    """
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in (t, h, w)), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)
