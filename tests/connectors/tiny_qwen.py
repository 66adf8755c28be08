"""A tiny Qwen2.5-VL with random weights, its tokenizer and processor: written to a folder that vLLM can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if 'text' in c %}{{ c['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN = 256
PIXELS_A_TOKEN = 28 * 28


def make(folder: Path) -> None:
    ids = _tokenizer(folder)
    _processors(folder)
    _model(folder, ids)


def _tokenizer(folder: Path) -> dict[str, int | None]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        chat_template=CHAT,
    )
    fast.save_pretrained(folder)
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return {name: tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL}


def _processors(folder: Path) -> None:
    fewest, most = 4 * PIXELS_A_TOKEN, 1024 * PIXELS_A_TOKEN
    image: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": fewest,
        "max_pixels": most,
        "size": {"shortest_edge": fewest, "longest_edge": most},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    video = {key: value for key, value in image.items() if key != "image_processor_type"}
    video["video_processor_type"] = "Qwen2VLVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def _model(folder: Path, ids: dict[str, int | None]) -> None:
    tokens: dict[str, Any] = {f"{name}_token_id": ids[f"{name}_pad"] for name in ("image", "video")}
    tokens |= {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **tokens,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # wide enough that answers depend on the image
                scale = 0.5 if "embed" in name else 0.15
                parameter.copy_(torch.randn(parameter.shape, generator=chance) * scale)
    model.save_pretrained(folder)
    _amend(folder / "config.json", architectures=["Qwen2_5_VLForConditionalGeneration"])
    generation = {"eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _amend(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
