"""How the processor of a model makes grids of pictures, for a router that has to know one before the encode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from embferry.models.grid_rule import GridRule

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FIELD = "image_grid_thw"
_SIZES = ((56, 56), (100, 57), (640, 480), (333, 1000), (4000, 3000))
"""Widths and heights with which the rule is tried."""


def picture_rule(model_config: ModelConfig) -> GridRule | None:
    """Returns the rule of a model; None for another kind of processor.

    Raises:
        Exception: anything that vLLM raises for its processor.
    """
    info = MULTIMODAL_REGISTRY.create_processor(model_config).info
    if not isinstance(info, Qwen2VLProcessingInfo) or model_config.get_multimodal_config().mm_processor_kwargs:
        return None
    processor, vision = info.get_image_processor(), info.get_hf_config().vision_config
    size, factor = processor.size, vision.patch_size * vision.spatial_merge_size
    limits = int(size["shortest_edge"]), int(size["longest_edge"])
    rule = GridRule(FIELD, int(vision.patch_size), int(factor), *limits)
    for width, height in _SIZES:
        told = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=processor, mm_kwargs={}
        )
        if told != math.prod(rule.tokens(width, height) or ()):
            return None
    return rule
