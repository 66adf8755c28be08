"""Writes a tiny Qwen2.5-VL with random weights, its tokenizer and its processors to a folder that an engine can load.

It is for tests and measurements that compare answers and do not care what they say. This module imports torch and
transformers, which are extras.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if 'text' in c %}{{ c['text'] }}{% else %}<|vision_start|>"
    "{% if 'video' in c['type'] %}<|video_pad|>{% else %}<|image_pad|>{% endif %}<|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN = 256
TEXT = {
    "vocab_size": 272,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
}


def make(folder: Path, *, max_image_tokens: int = 1024, max_positions: int = 8192) -> None:
    """Writes the model, 2.2 million parameters in float32; the same bytes each time.

    Args:
        folder: The directory to write; created if it is missing.
        max_image_tokens: Larger pictures are scaled down to this many tokens of 28 × 28 pixels.
        max_positions: Most tokens of a prompt together with its answer.
    """
    vision = {"depth": 2, "patch_size": 14, "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [1]}
    model_class, video_processor = Qwen2_5_VLForConditionalGeneration, "Qwen2VLVideoProcessor"
    write_model(folder, model_class, video_processor, vision, {}, max_image_tokens, max_positions)


def write_model(
    folder: Path,
    model_class: Any,
    video_processor: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    max_image_tokens: int,
    max_positions: int,
) -> None:
    """Writes a model of a class of transformers; ``vision`` and ``text`` complete or change its configuration.

    The spread of the random weights is wide enough that answers depend on the image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, max_positions)
    _write_processors(folder, video_processor, max_image_tokens, vision["patch_size"])
    special = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    config = model_class.config_class(
        text_config=TEXT | special | {"max_position_embeddings": max_positions} | text,
        vision_config=VISION | vision,
        tie_word_embeddings=False,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    write_weights(folder, model_class, config, ids)


def write_weights(folder: Path, model_class: Any, config: Any, ids: dict[str, int]) -> None:
    """Writes random weights and the configurations of a model, whose tokenizer has these ids of special tokens."""
    model = model_class(config).float().eval()
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.5 if "embed" in name else 0.15
                parameter.copy_(torch.randn(parameter.shape, generator=chance) * scale)
    model.save_pretrained(folder)
    _amend(folder / "config.json", architectures=[model_class.__name__])
    generation = {"eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_tokenizer(
    folder: Path, max_positions: int, special: Sequence[str] = SPECIAL, chat: str = CHAT
) -> dict[str, int]:
    """Writes a tokenizer with one token for each byte and special tokens; returns the ids of the latter.

    Args:
        folder: The directory to write in.
        max_positions: The most tokens of a text.
        special: The special tokens, without their brackets; ``im_end`` and ``endoftext`` are among them.
        chat: The chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_positions,
        chat_template=chat,
    )
    fast.save_pretrained(folder)
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    first = len(alphabet)
    return {name: first + at for at, name in enumerate(special)}


def _write_processors(folder: Path, video_processor: str, max_image_tokens: int, patch_size: int) -> None:
    pixels_a_token = (2 * patch_size) ** 2
    fewest, most = 4 * pixels_a_token, max_image_tokens * pixels_a_token
    both: dict[str, Any] = {
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": fewest,
        "max_pixels": most,
        "size": {"shortest_edge": fewest, "longest_edge": most},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    image, video = {"image_processor_type": "Qwen2VLImageProcessor"}, {"video_processor_type": video_processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(both | image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(both | video))


def _amend(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
