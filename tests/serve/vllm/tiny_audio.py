"""Writes a tiny Qwen2-Audio with random weights, its tokenizer and its processor to a folder that vLLM can load.

And sounds for it: WAV files of noise, no two of which have the same embedding.
"""

from __future__ import annotations

import io
import json
import random
import wave
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from embferry.models import tiny_qwen

SPECIAL = ("endoftext", "im_start", "im_end", "audio_bos", "AUDIO", "audio_eos")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if 'text' in c %}{{ c['text'] }}{% else %}<|audio_bos|><|AUDIO|><|audio_eos|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEL_BINS, RATE = 16, 16_000
AUDIO: dict[str, Any] = {
    "num_mel_bins": MEL_BINS,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
}


def make(folder: Path, max_positions: int = 8192) -> None:
    """Writes the model, 1.3 million parameters in float32; the same bytes each time.

    Its encoder takes 30 s of sound at a time, shorter ones with silence after them, as vLLM requires.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = tiny_qwen.write_tokenizer(folder, max_positions, SPECIAL, CHAT)
    WhisperFeatureExtractor(feature_size=MEL_BINS, sampling_rate=RATE, return_attention_mask=True).save_pretrained(
        folder
    )
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "Qwen2AudioProcessor"}))
    text = {name: value for name, value in tiny_qwen.TEXT.items() if name != "rope_parameters"}
    special = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    config = Qwen2AudioConfig(
        audio_config=dict(AUDIO),
        text_config=text | special | {"max_position_embeddings": max_positions},
        audio_token_index=ids["AUDIO"],
        tie_word_embeddings=False,
    )
    tiny_qwen.write_weights(folder, Qwen2AudioForConditionalGeneration, config, ids)
    weights = folder / "model.safetensors"  # transformers 5.19 writes a part of a name twice
    found = load_file(weights)
    save_file({name.replace(".model.model.", ".model."): each for name, each in found.items()}, weights)


def sound(seed: int, seconds: float = 1.0, rate: int = RATE) -> bytes:
    """Returns a WAV file of noise."""
    samples = random.Random(seed).randbytes(2 * round(seconds * rate))
    with io.BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(rate)
            writer.writeframes(samples)
        return file.getvalue()


def written(seed: int, form: str, samples: str, seconds: float = 1.0, channels: int = 1) -> bytes:
    """Returns a file of noise, by the names that libsndfile has for its format and its samples."""
    import numpy as np
    import soundfile

    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * RATE), channels))
    return _file(soundfile, noise, form, samples)


def silence(seconds: int) -> bytes:
    """Returns a FLAC file, which is short however long it lasts."""
    import numpy as np
    import soundfile

    return _file(soundfile, np.zeros(seconds * RATE, np.int16), "FLAC", "PCM_16")


def _file(soundfile: Any, samples: Any, form: str, subtype: str) -> bytes:
    with io.BytesIO() as file:
        soundfile.write(file, samples, RATE, format=form, subtype=subtype)
        return file.getvalue()
