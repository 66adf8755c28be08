"""Writes a tiny Qwen3-VL with random weights, as :mod:`.tiny_qwen` does for Qwen2.5-VL.

It has deepstack: the outputs of some layers of the vision encoder travel with the embedding.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3VLForConditionalGeneration

from .tiny_qwen import write_model

LEVELS = (0, 1)
"""Layers of the vision encoder whose outputs go to the first layers of the language model."""


def make(folder: Path, *, max_image_tokens: int = 1024, max_positions: int = 8192) -> None:
    """Writes the model in float32; the same bytes each time. An embedding is HIDDEN × (1 + len(LEVELS)) wide.

    Args:
        folder: The directory to write; created if it is missing.
        max_image_tokens: Larger pictures are scaled down to this many tokens of 32 × 32 pixels.
        max_positions: Most tokens of a prompt together with its answer.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = {"head_dim": 64, "rope_parameters": rope}
    vision = {"depth": 3, "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": list(LEVELS)}
    model_class, video_processor = Qwen3VLForConditionalGeneration, "Qwen3VLVideoProcessor"
    write_model(folder, model_class, video_processor, vision, text, max_image_tokens, max_positions)
