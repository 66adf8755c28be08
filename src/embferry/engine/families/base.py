"""What the engine asks of a model family.

A family is one file: it names the four classes of transformers it is made of and answers the questions below where its
answer differs from the one given here. Nothing outside this folder knows a family by name.
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
    """Which half of the model a tensor of the checkpoint belongs to."""

    VISION = "vision"
    TEXT = "text"
    HEAD = "head"


#: Prefix in the checkpoint → part. Files say either ``visual.*`` and ``model.*`` or ``model.visual.*`` and
#: ``model.language_model.*``, according to the family and to what wrote them; the first prefix that fits counts.
PREFIXES: tuple[tuple[str, Part], ...] = (
    ("model.visual.", Part.VISION),
    ("visual.", Part.VISION),
    ("model.language_model.", Part.TEXT),
    ("model.", Part.TEXT),
    ("lm_head.", Part.HEAD),
)


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """How large the frames of a video may become. ``factor`` is the side of a merged patch in pixels."""

    min_pixels: int
    max_pixels: int
    factor: int
    temporal_patch_size: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands in the prompt for one item.

    Attributes:
        text: replaces the item's mark in the rendered chat template. Holds one pad token a group.
        counts: how many times each of those pad tokens is repeated once the text has become token ids.
    """

    text: str
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens around media, as text."""

    image: str
    video: str
    start: str
    end: str


class Family(ABC):
    """Adapter of one model family; stateless, one instance for all models of the family."""

    model_type: ClassVar[str]
    #: Classes of transformers: the tower with its merger, the decoder, both without the head, and the whole.
    vision_class: Any
    text_class: Any
    base_class: Any
    undivided_class: Any

    # ---- checkpoint

    def place(self, key: str) -> tuple[Part, str] | None:
        """The half a tensor of the checkpoint belongs to and its name there; None for tensors neither half uses."""
        for prefix, part in PREFIXES:
            if key.startswith(prefix):
                return part, key[len(prefix) :]
        return None

    # ---- tower

    def deepstack_levels(self, config: Any) -> int:
        """How many extra rows of width ``hidden`` the tower gives for each token, for the decoder's first layers."""
        return 0

    def visual_rows(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the tower returned → embeddings ``[n, hidden]`` and deepstack rows ``[n, levels × hidden]`` or None."""
        return output.pooler_output, None

    # ---- media

    def timestamps(self, frames: int, fps: float, temporal_patch_size: int) -> tuple[float, ...]:
        """Seconds of every temporal patch, for the placeholders or the positions of this family."""
        return ()

    def video_size(self, frames: int, height: int, width: int, limits: VideoLimits) -> tuple[int, int]:
        """Height and width every frame is resized to. Raises ValueError if no size will do."""
        raise ValueError(f"{self.model_type} takes no video")

    # ---- prompt

    def placeholder(self, shape: MediaShape, merge: int, marks: Marks) -> Placeholder:
        """The item's text in the prompt, with the marks that enclose it."""
        pad = marks.image if shape.kind == "image" else marks.video
        return Placeholder(f"{marks.start}{pad}{marks.end}", (shape.num_tokens(merge),))

    def rope_arguments(self, shapes: Sequence[MediaShape]) -> dict[str, Any]:
        """Extra arguments of the family's ``get_rope_index``."""
        return {}

    def rope_index(
        self, config: Any, input_ids: torch.Tensor, token_types: torch.Tensor, shapes: Sequence[MediaShape]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt, from the configuration alone.

        Args:
            input_ids: int64 ``[1, L]``.
            token_types: int ``[1, L]``: 0 text, 1 image, 2 video.

        Returns:
            int64 ``[3, 1, L]`` (time, height, width) and the delta: a later token's position is its index plus it.
        """
        # get_rope_index reads the configuration and no weight, so an instance that has nothing else will do.
        model = object.__new__(self.base_class)
        model.__dict__["config"] = config
        positions, delta = model.get_rope_index(
            input_ids, mm_token_type_ids=token_types, **grid_arguments(shapes), **self.rope_arguments(shapes)
        )
        return positions, int(delta)


def grid_arguments(shapes: Sequence[MediaShape]) -> dict[str, torch.Tensor | None]:
    """``image_grid_thw`` and ``video_grid_thw`` as transformers takes them, int64 ``[items, 3]`` or None."""
    grids = {kind: [s.grid for s in shapes if s.kind == kind] for kind in ("image", "video")}
    return {f"{kind}_grid_thw": torch.tensor(rows) if rows else None for kind, rows in grids.items()}
