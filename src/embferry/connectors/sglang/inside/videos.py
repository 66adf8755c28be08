"""Time positions of videos: those of SGLang's encoder, or those of its undivided server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from ..process import settings

MODEL_TYPE, SECONDS = "qwen2_5_vl", "second_per_grid_ts"


async def process_video_items(
    original: Callable[..., Coroutine[Any, Any, Any]], preprocessor: Any, *args: Any, **kwargs: Any
) -> Any:
    """After SGLang's ``EncoderPreprocessor._process_video_items``: the seconds that one position in time stands for.

    Qwen2.5-VL's positions depend on the rate at which frames were taken from the video. SGLang's encoder takes 2 a
    second, and says so. Its undivided server takes the same frames, but does not tell transformers' processor, which
    then supposes its default of 24: there, a video of 12 s is as one of 1 s. Where both have to give the same answers,
    the encoder can be told to repeat that.
    """
    result = await original(preprocessor, *args, **kwargs)
    if settings().video_rate == "undivided" and preprocessor.model_type == MODEL_TYPE and SECONDS in result:
        rate = VideoMetadata(total_num_frames=1).sampled_fps
        result[SECONDS] = torch.full_like(result[SECONDS], preprocessor.video_processor.temporal_patch_size / rate)
    return result
