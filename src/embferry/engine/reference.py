"""The undivided model, run in one process by the code of transformers: the result that the two halves must equal.

It encodes one item in each call and prefills with the same chunk boundaries, because both affect the last bits of a
result. All else is done by transformers: merging embeddings and deepstack levels, positions, masks, cache and head.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from embferry.engine.checkpoint import read_config
from embferry.engine.families import family_of
from embferry.engine.families.base import Family, grid_arguments
from embferry.engine.language import DEFAULT_CHUNK_TOKENS, chunk_boundaries, end_tokens
from embferry.engine.media import PreparedItem
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.engine.sampling import SamplingParams, sample
from embferry.engine.shape import TOKEN_TYPE, Kind


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRun:
    """Generated token ids, and for each the logits ``[vocab]`` that it was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


_Features = tuple[Any, torch.Tensor, list[torch.Tensor]]
"""Output of the tower for all items of one kind, in sequence order: its class, the rows, and those of each level."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """An undivided model, as a reference."""

    family: Family
    model: Any
    end_tokens: frozenset[int]
    chunk_tokens: int

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.bfloat16,
        attn: str = "sdpa",
        threads: int = 1,
        prefill_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> Reference:
        """Loads a model. The arguments are those of :meth:`LanguageModel.load`."""
        torch.set_num_threads(threads)
        config = read_config(path)
        family = family_of(config)
        model = family.undivided_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attn, local_files_only=True
        )
        ends = end_tokens(path, config, PromptBuilder.load(path).tokenizer)
        return cls(family, model.eval(), ends, prefill_chunk_tokens)

    @torch.inference_mode()
    def run(self, prompt: Prompt, items: Sequence[PreparedItem], params: SamplingParams) -> ReferenceRun:
        """Generates an answer until an end token or ``params.max_tokens``; stop strings are ignored."""
        features = {kind: self._encode(items, kind) for kind in TOKEN_TYPE}
        arguments = grid_arguments(prompt.items) | self.family.rope_arguments(prompt.items)
        positions, delta = self.model.model.get_rope_index(
            prompt.input_ids, mm_token_type_ids=prompt.mm_token_type_ids, **arguments
        )
        cache = DynamicCache(config=self.model.config.text_config)
        logits = torch.empty(0)
        for start, stop in chunk_boundaries(prompt.length, self.chunk_tokens):
            chunk = self._chunk(prompt, features, start, stop)
            logits = self._forward(cache, prompt.input_ids[:, start:stop], positions[..., start:stop], chunk)
        run, generator = ReferenceRun(), params.generator()
        while True:
            run.logits.append(logits)
            run.tokens.append(sample(logits, params, generator))
            ended = run.tokens[-1] in self.end_tokens and not params.ignore_eos
            if ended or len(run.tokens) == params.max_tokens:
                return run
            position = torch.full((3, 1, 1), cache.get_seq_length() + int(delta))
            logits = self._forward(cache, torch.tensor([[run.tokens[-1]]]), position, {})

    def _encode(self, items: Sequence[PreparedItem], kind: Kind) -> _Features | None:
        encode = self.model.model.get_image_features if kind == "image" else self.model.model.get_video_features
        mine = [(item.pixel_values, torch.tensor([item.grid_thw])) for item in items if item.kind == kind]
        outputs = [encode(pixels, grid, return_dict=True) for pixels, grid in mine]
        if not outputs:
            return None
        each = [getattr(output, "deepstack_features", None) or [] for output in outputs]
        levels = [torch.cat([level[0] for level in same]) for same in zip(*each, strict=True)]
        return type(outputs[0]), torch.cat([output.pooler_output[0] for output in outputs]), levels

    def _chunk(self, prompt: Prompt, features: dict[Kind, _Features | None], start: int, stop: int) -> dict[str, Any]:
        """Returns each kind's features in ``[start, stop)`` of the sequence, as ``mm_encoder_outputs``."""
        chunk: dict[str, Any] = {}
        for kind, found in features.items():
            places = prompt.mm_token_type_ids[0] == TOKEN_TYPE[kind]
            before, inside = int(places[:start].sum()), int(places[start:stop].sum())
            if inside and found is not None:
                output_class, rows, levels = found
                chunk[kind] = output_class(pooler_output=(rows[before : before + inside],))
                if levels:
                    chunk[kind].deepstack_features = [(level[before : before + inside],) for level in levels]
        return chunk

    def _forward(self, cache: Any, ids: torch.Tensor, positions: torch.Tensor, chunk: dict[str, Any]) -> torch.Tensor:
        options = {"past_key_values": cache, "use_cache": True, "mm_encoder_outputs": chunk, "logits_to_keep": 1}
        logits: torch.Tensor = self.model(input_ids=ids, position_ids=positions, **options).logits[0, 0]
        return logits
