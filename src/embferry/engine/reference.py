"""The undivided model, run in one process by transformers' own code: what the split has to be equal to.

It encodes one item a call and prefills by the same chunk boundaries, since both change the last bits of a result. All
else is the model's own: where embeddings and deepstack rows go, positions, masks, cache, head.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from embferry.engine.checkpoint import read_config
from embferry.engine.families import Family, family_of
from embferry.engine.families.base import grid_arguments
from embferry.engine.language import end_tokens
from embferry.engine.media import PreparedItem
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.engine.sampling import SamplingParams, sample
from embferry.engine.schedule import DEFAULT_CHUNK_TOKENS, chunk_boundaries
from embferry.engine.shape import TOKEN_TYPE, Kind


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRun:
    """Token ids and, for each, the logits ``[vocab]`` it was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Features:
    """The tower's output for all items of one kind, rows in sequence order."""

    output_class: Any
    rows: torch.Tensor
    levels: list[torch.Tensor]

    def slice(self, start: int, stop: int) -> Any:
        """As the model's ``mm_encoder_outputs`` takes it."""
        output = self.output_class(pooler_output=(self.rows[start:stop],))
        if self.levels:
            output.deepstack_features = [(level[start:stop],) for level in self.levels]
        return output


class Reference:
    """An undivided model."""

    def __init__(self, family: Family, model: Any, ends: frozenset[int], chunk_tokens: int) -> None:
        self.family = family
        self.model = model
        self.end_tokens = ends
        self.chunk_tokens = chunk_tokens

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.bfloat16,
        attn: str = "sdpa",
        threads: int = 1,
        prefill_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> Reference:
        """Arguments as for ``LanguageModel.load``."""
        torch.set_num_threads(threads)
        config = read_config(path)
        family = family_of(config)
        model = family.undivided_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attn, local_files_only=True
        )
        tokenizer = PromptBuilder.load(path).tokenizer
        return cls(family, model.eval(), end_tokens(path, config, tokenizer), prefill_chunk_tokens)

    @torch.inference_mode()
    def run(self, prompt: Prompt, items: Sequence[PreparedItem], params: SamplingParams) -> ReferenceRun:
        """Answers a prompt; stops at an end token or at ``params.max_tokens``. Stop strings are not looked for."""
        features = {kind: self._encode(items, kind) for kind in TOKEN_TYPE}
        positions, delta = self.model.model.get_rope_index(
            prompt.input_ids,
            mm_token_type_ids=prompt.mm_token_type_ids,
            **grid_arguments(prompt.items),
            **self.family.rope_arguments(prompt.items),
        )
        cache = DynamicCache(config=self.model.config.text_config)
        logits = torch.empty(0)
        for start, stop in chunk_boundaries(prompt.length, self.chunk_tokens):
            logits = self._forward(
                cache,
                prompt.input_ids[:, start:stop],
                positions[..., start:stop],
                self._chunk(prompt, features, start, stop),
            )
        return self._generate(cache, int(delta), logits, params)

    def _generate(self, cache: Any, delta: int, logits: torch.Tensor, params: SamplingParams) -> ReferenceRun:
        run, generator = ReferenceRun(), params.generator()
        while True:
            run.logits.append(logits)
            run.tokens.append(sample(logits, params, generator))
            ended = run.tokens[-1] in self.end_tokens and not params.ignore_eos
            if ended or len(run.tokens) == params.max_tokens:
                return run
            position = torch.full((3, 1, 1), cache.get_seq_length() + delta)
            logits = self._forward(cache, torch.tensor([[run.tokens[-1]]]), position, {})

    def _encode(self, items: Sequence[PreparedItem], kind: Kind) -> _Features | None:
        encode = self.model.model.get_image_features if kind == "image" else self.model.model.get_video_features
        outputs = [
            encode(item.pixel_values, torch.tensor([item.grid_thw]), return_dict=True)
            for item in items
            if item.kind == kind
        ]
        if not outputs:
            return None
        each = [getattr(output, "deepstack_features", None) or [] for output in outputs]
        levels = [torch.cat([level[0] for level in same]) for same in zip(*each, strict=True)]
        return _Features(type(outputs[0]), torch.cat([output.pooler_output[0] for output in outputs]), levels)

    def _chunk(self, prompt: Prompt, features: dict[Kind, _Features | None], start: int, stop: int) -> dict[str, Any]:
        """The features of the placeholder tokens of each kind in ``[start, stop)``."""
        chunk: dict[str, Any] = {}
        for kind, found in features.items():
            places = prompt.mm_token_type_ids[0] == TOKEN_TYPE[kind]
            before, inside = int(places[:start].sum()), int(places[start:stop].sum())
            if inside and found is not None:
                chunk[kind] = found.slice(before, before + inside)
        return chunk

    def _forward(self, cache: Any, ids: torch.Tensor, positions: torch.Tensor, chunk: dict[str, Any]) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            mm_encoder_outputs=chunk,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[0, 0]
        return logits
