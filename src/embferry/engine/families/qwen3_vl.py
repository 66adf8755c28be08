"""Qwen3-VL: deepstack embeddings, and videos whose temporal patches each follow their time as text.

DeepStack (arXiv:2406.04334) adds features of earlier tower blocks to the output of the decoder's first layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextModel,
    Qwen3VLVisionModel,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from embferry.engine.families.base import Family, Marks, Placeholder, VideoLimits
from embferry.engine.shape import MediaShape


class Qwen3VL(Family):
    model_type = "qwen3_vl"
    vision_class: Any = Qwen3VLVisionModel
    text_class: Any = Qwen3VLTextModel
    base_class: Any = Qwen3VLModel
    undivided_class: Any = Qwen3VLForConditionalGeneration

    def deepstack_levels(self, config: Any) -> int:
        return len(config.vision_config.deepstack_visual_indexes)

    def visual_rows(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        levels = output.deepstack_features
        return output.pooler_output, torch.cat(levels, dim=-1) if levels else None

    def timestamps(self, frames: int, fps: float, temporal_patch_size: int) -> tuple[float, ...]:
        """Returns the mean time of the first and the last frame of each temporal patch, not counting padding."""
        firsts = range(0, frames, temporal_patch_size)
        lasts = (min(first + temporal_patch_size, frames) - 1 for first in firsts)
        return tuple((first / fps + last / fps) / 2 for first, last in zip(firsts, lasts, strict=True))

    def video_size(self, frames: int, height: int, width: int, limits: VideoLimits) -> tuple[int, int]:
        """Applies the limits to the whole video; with the cap, a frame gets at most an even share of them."""
        most = limits.max_pixels
        if limits.cap_pixels_per_frame:
            frame = min(limits.max_video_tokens * limits.factor**2, limits.max_pixels // frames)
            most = max(frame, int(limits.min_pixels * 1.05)) * frames
        # A single frame is padded to a whole temporal patch, the fewest frames that smart_resize accepts.
        frames = max(frames, limits.temporal_patch_size)
        rows, columns = smart_resize(
            frames, height, width, limits.temporal_patch_size, limits.factor, limits.min_pixels, most
        )
        return int(rows), int(columns)

    def placeholder(self, shape: MediaShape, merge: int, marks: Marks) -> Placeholder:
        if shape.kind == "image":
            return super().placeholder(shape, merge, marks)
        frame = f"{marks.start}{marks.video}{marks.end}"
        text = "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in shape.timestamps)
        patches = len(shape.timestamps)
        return text, (shape.num_tokens(merge) // patches,) * patches


FAMILY = Qwen3VL()
