"""Qwen2.5-VL: like Qwen2-VL, with temporal positions in proportion to time (``second_per_grid_ts``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)

from embferry.engine.families.qwen2_vl import Qwen2VL
from embferry.engine.shape import MediaShape


class Qwen25VL(Qwen2VL):
    model_type = "qwen2_5_vl"
    vision_class: Any = Qwen2_5_VisionTransformerPretrainedModel
    text_class: Any = Qwen2_5_VLTextModel
    base_class: Any = Qwen2_5_VLModel
    undivided_class: Any = Qwen2_5_VLForConditionalGeneration

    def timestamps(self, frames: int, fps: float, temporal_patch_size: int) -> tuple[float, ...]:
        """Returns the start of each temporal patch in seconds."""
        patches = -(-frames // temporal_patch_size)
        return tuple(patch * temporal_patch_size / fps for patch in range(patches))

    def rope_arguments(self, shapes: Sequence[MediaShape]) -> dict[str, Any]:
        times = [shape.timestamps for shape in shapes if shape.kind == "video"]
        # A single temporal patch has the position of its start for any interval.
        intervals = [each[1] - each[0] if len(each) > 1 else 1.0 for each in times]
        return {"second_per_grid_ts": torch.tensor(intervals)} if intervals else {}


FAMILY = Qwen25VL()
