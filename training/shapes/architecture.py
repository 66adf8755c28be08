"""The architecture of the network: a Qwen3-VL with deepstack, small enough to ship inside a package."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from training.shapes.tokenizer import (
    END,
    IMAGE,
    MAX_LENGTH,
    PAD,
    SPECIAL,
    START,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    token_id,
)

PATCH, MERGE, TEMPORAL = 8, 2, 2
TOKEN_SIDE = PATCH * MERGE
"""Side in pixels of the square that becomes one token."""
LEAST_PIXELS, MOST_PIXELS = 48 * TOKEN_SIDE**2, 64 * TOKEN_SIDE**2
"""Limits on the size of a picture or of a frame as the model sees it: 48 to 64 tokens."""

TEXT = {
    "model_type": "qwen3_vl_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.04,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": True,
}
VISION = {
    "model_type": "qwen3_vl_vision",
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_heads": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 2],
    "initializer_range": 0.04,
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "size": {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
}


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    ids = {token: token_id(tokenizer, token) for token in SPECIAL}
    text = {**TEXT, "eos_token_id": ids[END], "bos_token_id": ids[START], "pad_token_id": ids[PAD]}
    return Qwen3VLConfig(
        text_config=text,
        vision_config=dict(VISION),
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Returns a new model with random weights in float32."""
    return Qwen3VLForConditionalGeneration(build_config(tokenizer))
