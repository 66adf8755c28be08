"""Changes of logits before a token is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embferry.engine.choice import Chooser
from embferry.engine.errors import ParameterError
from embferry.engine.sampling import SamplingParams, sample

LOGITS = torch.tensor([1.0, 4.0, 3.0, 2.0, -1.0])
END = frozenset({1})


def choose(count: int = 1, prompt: list[int] | None = None, logits: torch.Tensor = LOGITS, **params) -> list[int]:
    """Returns the first tokens of an answer whose logits are always the same."""
    chooser = Chooser(SamplingParams(**params), torch.tensor(prompt or [0]), END)
    return [chooser.choose(logits) for _ in range(count)]


def test_without_any_of_them_the_logits_are_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr("embferry.engine.choice.sample", lambda logits, *_: seen.append(logits) or 0)
    assert choose() == [0]
    assert seen[0] is LOGITS


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, [1, 1, 1]),
        ({"min_tokens": 2}, [2, 2, 1]),
        ({"min_tokens": 2, "stop_token_ids": frozenset({2})}, [3, 3, 1]),
        ({"logit_bias": ((4, 100.0),)}, [4, 4, 4]),
        ({"logit_bias": ((1, -100.0),)}, [2, 2, 2]),
        ({"allowed_token_ids": (3, 4)}, [3, 3, 3]),
        ({"presence_penalty": 1.5}, [1, 2, 1]),  # 4, then 2.5 against 3, then 2.5 against 1.5
        ({"frequency_penalty": 1.0}, [1, 1, 2]),  # 4, 3 against 3 (the first of both), 2 against 3
        ({"repetition_penalty": 1.5}, [1, 2, 1]),  # 4, then 2.67 against 3, then 2.67 against 2
    ],
)
def test_greedy_choices(params, tokens):
    assert choose(3, **params) == tokens
    assert LOGITS.tolist() == [1.0, 4.0, 3.0, 2.0, -1.0]


def test_the_repetition_penalty_counts_the_prompt_and_lowers_negative_logits():
    assert choose(1, [1], repetition_penalty=2.0) == [2]
    below = torch.tensor([-1.0, -1.5])
    assert choose(1, [0], below, repetition_penalty=2.0) == [1]


def test_a_ban_of_everything_is_none():
    assert choose(1, allowed_token_ids=(1,), min_tokens=1) == [1]


def test_top_k_and_min_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    for params, wanted in (({"top_k": 2}, {0, 1}), ({"min_p": 0.25}, {0, 1, 2}), ({"top_k": 9}, {0, 1, 2, 3})):
        given = SamplingParams(temperature=1.0, seed=1, **params)
        generator = given.generator()
        assert {sample(logits, given, generator) for _ in range(300)} == wanted


def test_seeded_answers_are_those_of_before():
    """The random numbers, and the probabilities that they are compared with, are the same without the new fields."""
    logits = torch.linspace(0, 3, 50)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
    generator, probabilities = params.generator(), torch.softmax(logits / 0.8, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    kept = probabilities.index_fill(0, order[ordered.cumsum(-1) - ordered >= 0.9], 0.0)
    wanted = [int(torch.multinomial(kept, 1, generator=generator)) for _ in range(20)]
    chooser = Chooser(params, torch.tensor([0]), END)
    assert [chooser.choose(logits) for _ in range(20)] == wanted


def test_log_probabilities_are_the_models_own():
    chooser = Chooser(SamplingParams(logprobs=2, logit_bias=((4, 100.0),)), torch.tensor([0]), END)
    assert chooser.choose(LOGITS) == 4
    expected = torch.log_softmax(LOGITS, dim=-1).tolist()
    assert chooser.logprobs is not None
    assert chooser.logprobs.chosen == pytest.approx(expected[4])
    assert [token for token, _ in chooser.logprobs.top] == [1, 2]
    assert all(math.isfinite(value) for _, value in chooser.logprobs.top)


TINY = [5e-324, 1e-300, 1e-46, 1e-45, 1e-40, 1e-38, 1e-30, 1e-7]
EXTREMES = {
    "temperature": [0.0, *TINY, 1.0, 2.0],
    "top_p": [*TINY, 0.5, 1 - 2**-53, 1.0],
    "min_p": [0.0, *TINY, 0.5, 1 - 2**-53, 1.0],
    "repetition_penalty": [*TINY, 1.0, 1e7, 1e38, 1e39, 1e300, 1.7e308],
    "presence_penalty": [0.0, -2.0, 2.0, *TINY],
    "frequency_penalty": [0.0, -2.0, 2.0, *TINY],
    "top_k": [0, 1, 3, 5, 6, 2**31, 2**63],
    "logit_bias": [(), ((1, 100.0), (2, -100.0)), ((0, 5e-324),)],
    "allowed_token_ids": [None, (3,), (0, 4)],
    "min_tokens": [0, 2],
    "seed": [0, -(2**63), 2**64],
}
FLAT = [0.0] * 5
LOGITS_OF_MODELS = [LOGITS.tolist(), FLAT, [-1e4, 1e4, 0.0, -0.0, 1e-38], [-50.0, -40.0, -60.0, -45.0, -41.0]]


@given(
    st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in EXTREMES.items()}),
    st.sampled_from(LOGITS_OF_MODELS),
)
def test_no_value_in_its_range_makes_a_choice_impossible(params, logits):
    for token in choose(3, [0, 1], torch.tensor(logits), **params):
        assert 0 <= token < 5
        assert params.get("allowed_token_ids") is None or token in (*params["allowed_token_ids"], *END)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", TINY)
def test_tiny_values_take_the_likeliest_token(name, value):
    assert set(choose(50, seed=1, **{"temperature": 1.0, name: value})) == {1}


@pytest.mark.parametrize("value", TINY)
def test_an_extreme_repetition_penalty_goes_before_all_else(value):
    assert choose(3, [3], repetition_penalty=value) == [3, 3, 3]
    assert choose(3, [1, 2], repetition_penalty=1 / max(value, 1e-300)) == [3, 0, 1]


def test_choices_differ_by_their_number():
    params, logits = SamplingParams(temperature=1.0, seed=3, n=2), torch.zeros(1000)
    first, second = ([Chooser(params, torch.tensor([0]), END, number=n).choose(logits)] for n in (0, 1))
    assert first != second
    assert second == [Chooser(params, torch.tensor([0]), END, number=1).choose(logits)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"presence_penalty": 3.0},
        {"frequency_penalty": math.nan}, {"logit_bias": ((1, 101.0),)}, {"allowed_token_ids": ()},
        {"min_tokens": 5, "max_tokens": 4}, {"min_tokens": -1}, {"logprobs": 21}, {"n": 0},
    ],
)  # fmt: skip
def test_bad_parameters_are_rejected(wrong):
    with pytest.raises(ParameterError):
        SamplingParams(**wrong)


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_tokens_that_there_are_not_are_rejected(field):
    value = {"logit_bias": ((5, 1.0),), "stop_token_ids": frozenset({5})}.get(field, (5,))
    params = SamplingParams(**{field: value})
    params.check_tokens(6)
    with pytest.raises(ParameterError, match=f"{field} names token 5"):
        params.check_tokens(5)
