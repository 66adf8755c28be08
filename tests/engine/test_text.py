"""Streaming text, stop strings, chunk boundaries and sampling."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from embferry.engine.errors import ParameterError
from embferry.engine.language import chunk_boundaries
from embferry.engine.sampling import SamplingParams, sample
from embferry.engine.text import REPLACEMENT, Detokenizer, StopText
from tests.engine.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def pushed(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids], detokenizer.finish()


@pytest.mark.parametrize("text", ["plain words", "Größe naïve", "你好吗", "🙂👩‍🚀!", "a 🙂 b é", "�", "x�y"])
def test_only_whole_characters_are_emitted(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    deltas, rest = pushed(tokenizer, ids)
    assert "".join(deltas) + rest == text
    assert all(delta in text for delta in deltas)
    if REPLACEMENT not in text:
        assert rest == ""
        assert REPLACEMENT not in "".join(deltas)


def test_a_multi_byte_character_is_emitted_with_its_last_token(tokenizer):
    ids = tokenizer("🙂")["input_ids"]
    assert len(ids) > 1, "this test needs a character of several tokens"
    deltas, _ = pushed(tokenizer, ids)
    assert deltas == [""] * (len(ids) - 1) + ["🙂"]


def test_an_incomplete_character_is_replaced_at_the_end(tokenizer):
    ids = tokenizer("ab🙂")["input_ids"][:-1]
    deltas, rest = pushed(tokenizer, ids)
    assert "".join(deltas) == "ab"
    assert rest == REPLACEMENT


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_of_random_tokens_join_to_their_decoding(tokenizer, seed):
    """Most random tokens are bytes that form no character."""
    ids = random.Random(seed).choices(range(len(tokenizer)), k=60)
    deltas, rest = pushed(tokenizer, ids)
    assert "".join(deltas) + rest == tokenizer.decode(ids, skip_special_tokens=True)


def test_spaces_stay_although_the_tokenizer_drops_the_first():
    metaspace = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    metaspace.decoder = decoders.Metaspace()
    deltas, rest = pushed(PreTrainedTokenizerFast(tokenizer_object=metaspace), [0, 1, 1, 0])
    assert (deltas, rest) == (["a", " b", " b", " a"], "")


@pytest.mark.parametrize("stops", [("stop",), ("op no", "stop"), ("zz", "p")])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_first_stop_string(stops, size):
    text = "a sto stop now"
    stop = StopText(stops)
    given = "".join(stop.push(text[at : at + size]) for at in range(0, len(text), size))
    assert stop.stopped
    found = min(text.index(one) for one in stops if one in text)
    assert given == text[:found]


def test_withheld_text_is_emitted_when_it_becomes_no_stop_string():
    stop = StopText(("stop",))
    assert [stop.push(part) for part in ("a s", "to", "ne", " st")] == ["a ", "", "stone", " "]
    assert stop.finish() == "st"
    assert not stop.stopped


def test_chunks_cover_the_prompt():
    assert chunk_boundaries(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunk_boundaries(8, 4) == [(0, 4), (4, 8)]
    assert chunk_boundaries(3, 4) == [(0, 3)]
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="cannot cut"):
            chunk_boundaries(*wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ("",)},
    ],
)
def test_bad_parameters_are_rejected(wrong):
    with pytest.raises(ParameterError):
        SamplingParams(**wrong)


def test_greedy_sampling_takes_the_first_of_equal_logits():
    params = SamplingParams()
    assert sample(torch.tensor([0.0, 3.0, 3.0], dtype=torch.bfloat16), params, params.generator()) == 1


def test_top_p_excludes_unlikely_tokens():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    params = SamplingParams(temperature=1.0, top_p=0.75, seed=-3)
    generator = params.generator()
    drawn = {sample(logits, params, generator) for _ in range(200)}
    assert drawn == {1, 3}


def test_a_seed_makes_sampling_repeatable():
    logits = torch.zeros(1000)

    def draw(params):
        generator = params.generator()
        return [sample(logits, params, generator) for _ in range(8)]

    seeded, free = SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0)
    assert draw(seeded) == draw(seeded)
    assert draw(free) != draw(free)
