"""Difference between prefill in chunks and prefill in one piece: the table of docs/engine.md.

Run ``python -m benchmarks.prefill_chunks``. Prints the largest difference of the first token's logits, over prompts of
two pictures and a video, for a random tiny model of every family and for the packaged model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel, chunk_boundaries
from embferry.engine.prompt import Prompt
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import ResidentSource
from embferry.models import DEFAULT_MODEL, model_path
from tests.engine.tiny import FAMILIES, build_model, picture, video

CHUNKS = (1, 16, 64, 128)
WHOLE = 1 << 20
PROMPTS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Input = tuple[Prompt, ResidentSource]


def prompts(path: Path, dtype: torch.dtype, model: LanguageModel) -> Iterator[Input]:
    """Yields prompts with two pictures and a video of noise, different ones each time."""
    encoder = Encoder.load(path, dtype)
    content = [{"type": kind} for kind in ("image", "image", "video")]
    for seed in range(PROMPTS):
        prepared = encoder.prepare([picture(3 * seed), picture(3 * seed + 1, 96, 64), video(3 * seed + 2)])
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "which colour is it?"}]}]
        prompt = model.prompts.build(messages, [item.shape for item in prepared])
        yield prompt, ResidentSource(*map(encoder.encode, prepared))


def first_logits(model: LanguageModel, given: Input, chunk: int) -> torch.Tensor:
    """Returns the logits of the first token, float32 ``[vocab]``, with prefill in chunks of so many tokens."""
    prompt, source = given
    sequence = model.start(prompt, SamplingParams(max_tokens=1))
    sequence.chunks = chunk_boundaries(prompt.length, chunk)
    while not sequence.prefilled:
        first, last = sequence.next_visual_range
        model.prefill_chunk(sequence, {spec.name: source.read(spec.name, first, last) for spec in model.fields})
    assert sequence.logits is not None
    return sequence.logits.float()


def measure(name: str, path: Path) -> None:
    """Prints the two rows of a model."""
    for label, dtype in DTYPES.items():
        model = LanguageModel.load(path, dtype)
        worst, changed, largest = dict.fromkeys(CHUNKS, 0.0), 0, 0.0
        for given in prompts(path, dtype, model):
            whole = first_logits(model, given, WHOLE)
            largest = max(largest, float(whole.abs().max()))
            for chunk in CHUNKS:
                cut = first_logits(model, given, chunk)
                worst[chunk] = max(worst[chunk], float((cut - whole).abs().max()))
                changed += int(cut.argmax() != whole.argmax())
        cells = " | ".join(f"{worst[chunk]:.1e}" if worst[chunk] else "0" for chunk in CHUNKS)
        print(f"| {name} | {label} | {cells} | {largest:.1f} | {changed} of {PROMPTS * len(CHUNKS)} |", flush=True)


def main() -> None:
    print(f"| model | dtype | {' | '.join(f'chunks of {chunk}' for chunk in CHUNKS)} | largest logit | other token |")
    print("|---" * (len(CHUNKS) + 4) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            measure(f"random {family}", build_model(Path(folder) / family, family))
    measure("packaged", model_path(DEFAULT_MODEL))


if __name__ == "__main__":
    main()
