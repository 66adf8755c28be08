"""Qwen2-VL: a video is one run of placeholders, and its positions do not depend on time."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLTextModel,
)

from embferry.engine.families.base import Family, VideoLimits


class Qwen2VL(Family):
    model_type = "qwen2_vl"
    vision_class: Any = Qwen2VisionTransformerPretrainedModel
    text_class: Any = Qwen2VLTextModel
    base_class: Any = Qwen2VLModel
    undivided_class: Any = Qwen2VLForConditionalGeneration

    def video_size(self, frames: int, height: int, width: int, limits: VideoLimits) -> tuple[int, int]:
        """Applies the limits to each frame; with the cap, a frame gets at most an even share of 90% of the tokens."""
        most = limits.max_pixels
        if limits.cap_pixels_per_frame:
            share = int(limits.max_video_tokens * limits.factor**2 * 0.9) * limits.temporal_patch_size // frames
            most = max(min(most, share), int(limits.min_pixels * 1.05))
        rows, columns = smart_resize(height, width, limits.factor, limits.min_pixels, most)
        return int(rows), int(columns)


FAMILY = Qwen2VL()
