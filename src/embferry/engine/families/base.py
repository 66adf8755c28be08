"""The interface of a model family.

A family is one file with a subclass of :class:`Family`. It sets the four classes of transformers that the family
consists of and overrides the methods whose defaults do not fit. No module outside of this folder names a family.
"""

from __future__ import annotations

import enum
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from embferry.engine.shape import MediaShape


class Part(enum.Enum):
    """The part of the model that a tensor of the checkpoint belongs to."""

    VISION = "vision"
    TEXT = "text"
    HEAD = "head"


#: Prefix in the checkpoint → part; the first prefix that matches applies. Names are either ``visual.*`` and ``model.*``
#: or ``model.visual.*`` and ``model.language_model.*``, depending on the family and on the program that wrote the file.
PREFIXES = {
    "model.visual.": Part.VISION,
    "visual.": Part.VISION,
    "model.language_model.": Part.TEXT,
    "model.": Part.TEXT,
    "lm_head.": Part.HEAD,
}
PREFIX_OF = {part: prefix for prefix, part in PREFIXES.items()}
"""For messages about a tensor that is missing: the last prefix of each part."""


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Limits on the size of the frames of a video.

    Attributes:
        min_pixels: Fewest pixels of a frame, or of the video for families that limit the whole.
        max_pixels: Most pixels, counted likewise.
        factor: Side of a merged patch in pixels.
        temporal_patch_size: Frames in a temporal patch.
        cap_pixels_per_frame: Whether a frame gets at most an even share of the video's limit.
        max_video_tokens: Most tokens of a video; used only with ``cap_pixels_per_frame``.
    """

    min_pixels: int
    max_pixels: int
    factor: int
    temporal_patch_size: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


Placeholder = tuple[str, tuple[int, ...]]
"""The part of a prompt that represents one item.

The text replaces the item's mark in the rendered chat template. It has one pad token for each of the numbers, which say
how often each of these is repeated after the text has been tokenized.
"""


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens that mark media in a prompt, as text."""

    image: str
    video: str
    start: str
    end: str


class Family(ABC):
    """Adapter of one model family. Stateless; one instance serves all models of the family."""

    model_type: ClassVar[str]
    #: Classes of transformers: the tower with its merger, the decoder, both without the head, and the whole model.
    vision_class: Any
    text_class: Any
    base_class: Any
    undivided_class: Any

    def place(self, key: str) -> tuple[Part, str] | None:
        """Returns the part that a tensor belongs to and its name in that part; None for a tensor that no part uses."""
        for prefix, part in PREFIXES.items():
            if key.startswith(prefix):
                return part, key[len(prefix) :]
        return None

    def deepstack_levels(self, config: Any) -> int:
        """Returns the number of extra vectors ``[hidden]`` for each token, added in the decoder's first layers."""
        return 0

    def visual_rows(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the embeddings ``[n, hidden]`` and the deepstack embeddings ``[n, levels × hidden]`` or None.

        Args:
            output: The output of ``vision_class``.
        """
        return output.pooler_output, None

    def timestamps(self, frames: int, fps: float, temporal_patch_size: int) -> tuple[float, ...]:
        """Returns the time of every temporal patch in seconds; empty if the family does not use it."""
        return ()

    def video_size(self, frames: int, height: int, width: int, limits: VideoLimits) -> tuple[int, int]:
        """Returns the height and width that every frame is resized to, in pixels.

        Raises:
            ValueError: No size satisfies the limits.
        """
        raise ValueError(f"{self.model_type} does not take videos")

    def placeholder(self, shape: MediaShape, merge: int, marks: Marks) -> Placeholder:
        """Returns the placeholder of an item, including the marks that enclose it."""
        pad = marks.image if shape.kind == "image" else marks.video
        return f"{marks.start}{pad}{marks.end}", (shape.num_tokens(merge),)

    def rope_arguments(self, shapes: Sequence[MediaShape]) -> dict[str, Any]:
        """Returns extra arguments for the family's ``get_rope_index``."""
        return {}

    def rope_index(
        self, config: Any, input_ids: torch.Tensor, token_types: torch.Tensor, shapes: Sequence[MediaShape]
    ) -> tuple[torch.Tensor, int]:
        """Returns the rotary positions of a prompt, computed without weights.

        Args:
            config: The model's configuration; ``get_rope_index`` reads nothing else of the model.
            input_ids: int64 ``[1, L]``.
            token_types: Int ``[1, L]``: 0 text, 1 image, 2 video.
            shapes: Shapes of the media, in order.

        Returns:
            Positions, int64 ``[3, 1, L]`` (time, height, width), and a delta: the position of a generated token is its
            index plus the delta.
        """
        model = object.__new__(self.base_class)
        model.__dict__["config"] = config
        positions, delta = model.get_rope_index(
            input_ids, mm_token_type_ids=token_types, **grid_arguments(shapes), **self.rope_arguments(shapes)
        )
        return positions, int(delta)


def grid_arguments(shapes: Sequence[MediaShape]) -> dict[str, torch.Tensor | None]:
    """Returns ``image_grid_thw`` and ``video_grid_thw`` for transformers, int64 ``[items, 3]`` or None."""
    grids = {kind: [s.grid for s in shapes if s.kind == kind] for kind in ("image", "video")}
    return {f"{kind}_grid_thw": torch.tensor(rows) if rows else None for kind, rows in grids.items()}
