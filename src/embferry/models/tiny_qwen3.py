"""Writes a tiny Qwen3-VL with random weights, as :mod:`.tiny_qwen` does for Qwen2.5-VL.

It has deepstack: the outputs of some layers of the vision encoder travel with the embedding.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .tiny_qwen import HIDDEN, text_config, vision_tokens, write_model, write_processors, write_tokenizer

LEVELS = (0, 1)
"""Layers of the vision encoder whose outputs go to the first layers of the language model."""


def make(folder: Path, *, max_image_tokens: int = 1024, max_positions: int = 8192) -> None:
    """Writes the model in float32; the same bytes each time. An embedding is HIDDEN × (1 + len(LEVELS)) wide.

    Args:
        folder: The directory to write; created if it is missing.
        max_image_tokens: Larger pictures are scaled down to this many tokens of 32 × 32 pixels.
        max_positions: Most tokens of a prompt together with its answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, max_positions)
    write_processors(folder, "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", max_image_tokens, patch_size=16)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text_config(ids, max_positions) | {"head_dim": 64, "rope_parameters": rope},
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(LEVELS),
        },
        tie_word_embeddings=False,
        **vision_tokens(ids),
    )
    write_model(folder, Qwen3VLForConditionalGeneration(config), ids)
