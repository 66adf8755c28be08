"""The models that tests compare, and the requests on which they compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from embferry.engine.embedding import Embedding
from embferry.engine.encoder import Encoder
from embferry.engine.families.base import grid_arguments
from embferry.engine.language import LanguageModel
from embferry.engine.media import MediaItem, PreparedItem
from embferry.engine.prompt import Prompt
from embferry.engine.reference import Reference, ReferenceRun
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import EmbeddingSource, ResidentSource
from tests.engine.tiny import picture, video

CASES: dict[str, Callable[[], list[MediaItem]]] = {
    "text": list,
    "one image": lambda: [picture(1, 96, 64)],
    "three images": lambda: [picture(1), picture(2, 96, 32), picture(3, 40, 90)],
    "video": lambda: [video(4)],
    "image and video": lambda: [picture(5, 64, 48), video(6, frames=4)],
}
#: More tokens than any prompt here has: prefill in one piece, as ``generate`` does it.
WHOLE = 1 << 20


@dataclass(frozen=True)
class Asked:
    prepared: list[PreparedItem]
    embeddings: list[Embedding]
    prompt: Prompt

    def source(self) -> ResidentSource | None:
        return ResidentSource(*self.embeddings) if self.embeddings else None


@dataclass(frozen=True)
class Split:
    path: Path
    encoder: Encoder
    language: LanguageModel
    undivided: Reference

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, chunk: int = WHOLE) -> Split:
        return cls(
            path,
            Encoder.load(path, dtype),
            LanguageModel.load(path, dtype, prefill_chunk_tokens=chunk),
            Reference.load(path, dtype, prefill_chunk_tokens=chunk),
        )

    def chunked(self, chunk: int) -> Split:
        """Returns models with the same weights that prefill in chunks."""
        language, undivided = self.language, self.undivided
        return replace(
            self,
            language=LanguageModel(language.prompts, language._decoder, language._head, language.end_tokens, chunk),
            undivided=Reference(undivided.family, undivided.model, undivided.end_tokens, chunk),
        )

    def num_parameters(self) -> tuple[int, int]:
        """Returns the numbers of parameters of the encoder and of the language model."""
        decoder = list(self.language._decoder.parameters())
        head = self.language._head
        tied = any(head is parameter for parameter in decoder)
        language = sum(parameter.numel() for parameter in decoder) + (0 if tied else head.numel())
        return sum(parameter.numel() for parameter in self.encoder._tower.parameters()), language

    def ask(self, items: Sequence[MediaItem], question: str = "which colour is it?") -> Asked:
        parts: list[dict[str, str]] = []
        for number, item in enumerate(items):
            kind = "image" if isinstance(item, Image.Image) else "video"
            parts += [{"type": "text", "text": f"Picture {number}: "}, {"type": kind}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        prepared = self.encoder.prepare(items)
        prompt = self.language.prompts.build(messages, [item.shape for item in prepared])
        return Asked(prepared, [self.encoder.encode(item) for item in prepared], prompt)

    def answer(self, prompt: Prompt, source: EmbeddingSource | None, params: SamplingParams) -> ReferenceRun:
        """Runs the language half alone; all visual tokens of a chunk must have arrived."""
        run, sequence = ReferenceRun(), self.language.start(prompt, params)
        while sequence.finish_reason is None:
            if sequence.prefilled:
                self.language.decode_step(sequence)
            else:
                first, last = sequence.next_visual_range
                names = [spec.name for spec in self.language.fields]
                fields = {name: source.read(name, first, last) for name in names} if source is not None else None
                self.language.prefill_chunk(sequence, fields)
            if sequence.logits is not None:
                run.logits.append(sequence.logits)
        run.tokens.extend(sequence.tokens)
        return run

    def generate(self, asked: Asked, tokens: int) -> ReferenceRun:
        """Runs the stock ``generate`` of transformers, from the pixels on.

        ``generate`` encodes all pictures in one call, which may change their last bits. So where there are several, its
        own tower encodes them one by one before, and ``generate`` gets the features.
        """
        pixels: dict[str, Any] = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            values = [item.pixel_values for item in asked.prepared if item.kind == kind]
            if len(values) > 1:
                with torch.inference_mode():
                    features = {kind: self.undivided._encode(asked.prepared, kind)}
                pixels["mm_encoder_outputs"] = self.undivided._chunk(asked.prompt, features, 0, asked.prompt.length)
            elif values:
                pixels[name] = values[0]
        prompt, model = asked.prompt, self.undivided.model
        model.model.rope_deltas = None
        made = model.generate(
            input_ids=prompt.input_ids,
            attention_mask=torch.ones_like(prompt.input_ids),
            mm_token_type_ids=prompt.mm_token_type_ids,
            **{name: grid for name, grid in grid_arguments(prompt.items).items() if grid is not None},
            **self.undivided.family.rope_arguments(prompt.items),
            **pixels,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        new = made.sequences[0, prompt.length :].tolist()
        return ReferenceRun(new, [logits[0] for logits in made.logits])


def assert_same(run: ReferenceRun, other: ReferenceRun) -> None:
    """Asserts that two runs have the same tokens and, bit by bit, the same logits."""
    assert run.tokens == other.tokens
    assert len(run.logits) == len(other.logits) == len(run.tokens)
    for step, (logits, others) in enumerate(zip(run.logits, other.logits, strict=True)):
        assert torch.equal(logits.float(), others.float()), f"logits differ at step {step}"
