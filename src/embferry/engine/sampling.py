"""From logits to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from embferry.engine.errors import ParameterError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request wants its answer.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; up to 2.
        top_p: sample from the likeliest tokens whose probabilities add up to this (arXiv:1904.09751).
        seed: of the request's own generator; drawn at random if None.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on after the model's end token.

    Raises:
        ParameterError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ParameterError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise ParameterError(f"temperature must be from 0 to 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ParameterError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not all(self.stop):
            raise ParameterError("a stop string must not be empty")

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            # Any integer will do for a seed, torch takes 64 bits.
            generator.manual_seed(self.seed & 0xFFFF_FFFF_FFFF_FFFF)
        return generator


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token of logits ``[vocab]``. The first of several equals is the likeliest, as in ``generate``."""
    scores = logits.float()
    if params.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / params.temperature, dim=-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.index_fill(0, order[before >= params.top_p], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
