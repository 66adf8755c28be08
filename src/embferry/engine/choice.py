"""Changes of logits before a token is chosen: penalties, biases, tokens that are banned, and a grammar.

The order is vLLM's: the grammar, allowed tokens, end tokens that come too early, biases, penalties. A request that asks
for none of them is chosen from the model's logits as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embferry.engine.errors import ParameterError
from embferry.engine.grammar import Matcher
from embferry.engine.sampling import SamplingParams, sample

_BANNED = float("-inf")
_MOST_REPETITION = 1e6
"""Repetition penalties count as at most this and at least 1 / this, so that logits stay finite in 32 bits and
banned tokens stay banned. A penalty decides alone long before this bound."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities by the model's own logits.

    Attributes:
        chosen: Of the token that was chosen.
        top: Ids and log probabilities of the likeliest tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        params: The request's.
        prompt: int64 ``[length]``, the ids of the prompt's tokens.
        ends: Tokens that end the answer.
        matcher: The grammar that the answer must match; None: any text.
        number: Which of the request's choices it is.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: torch.Tensor,
        ends: frozenset[int],
        matcher: Matcher | None = None,
        number: int = 0,
    ) -> None:
        self._params, self._matcher = params, matcher
        self._generator = params.generator(number)
        self._ends = torch.tensor(sorted(ends | params.stop_token_ids), dtype=torch.int64)
        self._prompt = torch.unique(prompt) if params.repetition_penalty != 1 else prompt[:0]
        self._counts: dict[int, int] = {}
        self._chosen = 0
        self.logprobs: Logprobs | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._matcher is not None and self._matcher.is_complete

    def choose(self, logits: torch.Tensor) -> int:
        """Returns the next token by logits ``[vocab]``, which are not changed."""
        token = sample(self._adjusted(logits), self._params, self._generator)
        if self._params.logprobs is not None:
            self.logprobs = _logprobs(logits, token, self._params.logprobs)
        if self._matcher is not None:
            self._matcher.accept(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._chosen += 1
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        params = self._params
        has_early_end = self._chosen < params.min_tokens
        is_plain = self._matcher is None and params.allowed_token_ids is None and not params.logit_bias
        if is_plain and not has_early_end and not self._has_penalty:
            return logits
        scores = logits.float().clone()
        if self._matcher is not None:
            scores = scores.masked_fill(~self._matcher.mask(len(scores)), _BANNED)
        if params.allowed_token_ids is not None:
            scores = self._allowed(scores, torch.tensor(params.allowed_token_ids))
        if has_early_end:
            scores = _unless_all(scores, scores.index_fill(0, self._ends, _BANNED))
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            scores.index_add_(0, torch.tensor(ids), torch.tensor(biases, dtype=torch.float32))
        return self._penalized(scores) if self._has_penalty else scores

    def _allowed(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the allowed tokens; those that end the answer, if its form allows no other."""
        for kept in (ids, self._ends):
            if bool(torch.isfinite(left := _except(scores, kept)).any()):
                return left
        why = "the answer's form allows none of the tokens of allowed_token_ids"
        raise ParameterError(why, param="allowed_token_ids")

    @property
    def _has_penalty(self) -> bool:
        params = self._params
        return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)

    def _penalized(self, scores: torch.Tensor) -> torch.Tensor:
        params = self._params
        seen = torch.tensor(list(self._counts), dtype=torch.int64)
        if params.repetition_penalty != 1:
            all_seen = torch.unique(torch.cat((self._prompt, seen)))
            some, by = scores[all_seen], min(max(params.repetition_penalty, 1 / _MOST_REPETITION), _MOST_REPETITION)
            scores[all_seen] = torch.where(some > 0, some / by, some * by)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
        scores[seen] -= params.frequency_penalty * counts + params.presence_penalty
        return scores


def _except(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    banned = torch.full_like(scores, _BANNED)
    banned[kept] = scores[kept]
    return banned


def _unless_all(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Returns ``after``, unless no token is left in it: a grammar may allow nothing but the end."""
    return after if bool(torch.isfinite(after).any()) else before


def _logprobs(logits: torch.Tensor, token: int, count: int) -> Logprobs:
    values = torch.log_softmax(logits.float(), dim=-1)
    found = values.topk(min(count, len(values)))
    top = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return Logprobs(float(values[token]), tuple((int(id), float(value)) for id, value in top))
