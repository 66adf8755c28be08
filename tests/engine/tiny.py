"""Writes tiny random models of every family as complete model directories: weights in shards, tokenizer, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from embferry.engine.families import family_of
from embferry.engine.media import Video

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in NAMES)
#: Like the chat templates on the hub: a media part becomes a pad between its marks, a text part its text.
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["which colour is it", "<0.5 seconds> <1.2 seconds>", "user\n", "assistant\n", "Größe, naïve, 你好, 🙂"] * 4
PATCH, MERGE = 8, 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def build_config(model_type: str, tokenizer: Any) -> Any:
    tied = model_type == "qwen3_vl"
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            tokenizer.convert_tokens_to_ids(list(SPECIAL[3:])),
            strict=True,
        )
    )
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    vision |= {"intermediate_size": 96, "out_hidden_size": 64}
    if model_type == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text["head_dim"] = 16
    text["rope_parameters"]["mrope_interleaved"] = True
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def build_model(path: Path, model_type: str) -> Path:
    """Writes a random model to ``path`` and returns it."""
    tokenizer = build_tokenizer()
    config = build_config(model_type, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = family_of(config).undivided_class(config)
        model.save_pretrained(path, max_shard_size="150KB")
    tokenizer.save_pretrained(path)
    size = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    settings = {"size": size, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    video = {"size": {"shortest_edge": 32 * 32, "longest_edge": 8 * 64 * 64}}
    (path / "video_preprocessor_config.json").write_text(json.dumps(video))
    return path


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def video(seed: int, frames: int = 5, width: int = 48, height: int = 64, fps: float = 2.0) -> Video:
    return Video([picture(seed * 100 + number, width, height) for number in range(frames)], fps)
