"""Sampling parameters, and the choice of a token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from embferry.engine.errors import ParameterError

MAX_LOGPROBS = 20
MIN_TEMPERATURE = 0.01
"""Lower temperatures above 0 are raised to this, as in vLLM: a division by them would leave the numbers there are."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of how an answer is generated. Names and meanings are those of vLLM.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: From 0, which takes the likeliest token, to 2; above 0, at least ``MIN_TEMPERATURE`` counts.
        top_p: Samples from the likeliest tokens whose probabilities add up to this (arXiv:1904.09751).
        seed: Seed of the request's random generator; drawn at random if None. Choice i has the seed plus i.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Whether to go on after an end token of the model.
        top_k: Samples from this many likeliest tokens; 0: from all.
        min_p: Samples from tokens at least this probable, relative to the likeliest one (arXiv:2407.01082).
        repetition_penalty: Divides the positive logits of tokens in prompt and answer, and multiplies the negative
            ones (arXiv:1909.05858).
        presence_penalty: Taken from the logit of each token of the answer, from -2 to 2.
        frequency_penalty: The same for each time that the token occurs.
        logit_bias: Ids of tokens and what is added to their logits, from -100 to 100.
        allowed_token_ids: The only tokens that may be chosen; None: all.
        min_tokens: Tokens before which neither an end token nor a stop string ends the answer.
        stop_token_ids: Tokens that end the answer beside the model's own.
        include_stop: Whether the text of what ended the answer is part of it.
        skip_special_tokens: Whether control tokens have no text.
        logprobs: How many of the likeliest tokens to name beside each token, with their log probabilities; None: log
            probabilities are not computed.
        n: Answers to the prompt.

    Raises:
        ParameterError: A value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, is_right, what in (
            ("max_tokens", self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
            (
                "temperature",
                _within(self.temperature, 0, 2),
                f"temperature must be from 0 to 2, not {self.temperature}",
            ),
            ("top_p", 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}"),
            ("stop", all(self.stop), "a stop string must not be empty"),
            ("top_k", self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}"),
            ("min_p", _within(self.min_p, 0, 1), f"min_p must be from 0 to 1, not {self.min_p}"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty must be above 0, not {self.repetition_penalty}",
            ),
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "presence_penalty must be from -2 to 2"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "frequency_penalty must be from -2 to 2"),
            (
                "logit_bias",
                all(_within(bias, -100, 100) for _, bias in self.logit_bias),
                "a bias must be from -100 to 100",
            ),
            ("allowed_token_ids", self.allowed_token_ids != (), "allowed_token_ids must not be empty"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs must be 0 to {MAX_LOGPROBS}",
            ),
            ("n", self.n >= 1, f"n must be at least 1, not {self.n}"),
        ):
            if not is_right:
                raise ParameterError(what, param=name)

    def check_tokens(self, vocabulary: int) -> None:
        """Raises ParameterError if a field names a token that the model does not have."""
        fields = {
            "logit_bias": [token for token, _ in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in fields.items():
            if (wrong := next((id for id in ids if not 0 <= id < vocabulary), None)) is not None:
                raise ParameterError(
                    f"{name} names token {wrong}; the model has those from 0 to {vocabulary - 1}", param=name
                )

    def generator(self, choice: int = 0) -> torch.Generator:
        """Returns the random generator of one of the choices."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            # A seed may be any integer; torch takes 64 bits.
            generator.manual_seed((self.seed + choice) & 0xFFFF_FFFF_FFFF_FFFF)
        return generator


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Chooses a token by logits ``[vocab]``. At temperature 0 it is the first of equal maxima, as in ``generate``."""
    scores = logits.float()
    if params.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / max(params.temperature, MIN_TEMPERATURE), dim=-1)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    if 0 < params.top_k < len(probabilities):
        least = probabilities.topk(params.top_k).values[-1]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if params.min_p > 0 or params.top_k > 0:
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        is_beyond = before >= params.top_p
        is_beyond[0] = False  # the likeliest token stays, also where top_p is 0 in 32 bits
        probabilities = probabilities.index_fill(0, order[is_beyond], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _within(value: float, least: float, most: float) -> bool:
    return math.isfinite(value) and least <= value <= most
