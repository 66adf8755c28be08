"""Sampling parameters, and the choice of a token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from embferry.engine.errors import ParameterError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of how an answer is generated.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: From 0, which takes the likeliest token, to 2.
        top_p: Samples from the likeliest tokens whose probabilities add up to this (arXiv:1904.09751).
        seed: Seed of the request's random generator; drawn at random if None.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Whether to go on after an end token of the model.

    Raises:
        ParameterError: A value is out of range.
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
            # A seed may be any integer; torch takes 64 bits.
            generator.manual_seed(self.seed & 0xFFFF_FFFF_FFFF_FFFF)
        return generator


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Chooses a token by logits ``[vocab]``. At temperature 0 it is the first of equal maxima, as in ``generate``."""
    scores = logits.float()
    if params.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / params.temperature, dim=-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.index_fill(0, order[before >= params.top_p], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
