"""How the processor of a model makes grids of pictures, for a router that has to know one before the encode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FIELD = "image_grid_thw"
_SIZES = ((56, 56), (100, 57), (640, 480), (333, 1000), (4000, 3000))
"""Widths and heights with which the rule is tried."""


def picture_rule(model_config: ModelConfig) -> dict[str, Any] | None:
    """Returns the fields of ``embferry.serve.vllm.picture_grids.GridRule``; None for another kind of processor.

    Raises:
        Exception: anything that vLLM raises for its processor.
    """
    info = MULTIMODAL_REGISTRY.create_processor(model_config).info
    if not isinstance(info, Qwen2VLProcessingInfo) or model_config.get_multimodal_config().mm_processor_kwargs:
        return None
    processor, vision = info.get_image_processor(), info.get_hf_config().vision_config
    size, factor = processor.size, vision.patch_size * vision.spatial_merge_size
    least, most = int(size["shortest_edge"]), int(size["longest_edge"])
    for width, height in _SIZES:
        told = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=processor, mm_kwargs={}
        )
        if told != _tokens(width, height, factor, least, most):
            return None
    return {"field": FIELD, "patch": int(vision.patch_size), "factor": factor, "min_pixels": least, "max_pixels": most}


def _tokens(width: int, height: int, factor: int, least: int, most: int) -> int:
    """Returns the tokens of a picture by the arithmetic that the rule stands for."""
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < least:
        stretch = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * stretch / factor) for side in (height, width))
    return rows * columns
