"""Grammars for answers of a given form: a JSON schema, a regular expression, a list of texts."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from embferry.engine import grammar
from embferry.engine.errors import ParameterError
from embferry.engine.grammar import Grammars
from embferry.engine.language import LanguageModel
from embferry.engine.sampling import SamplingParams
from embferry.engine.scheduler import Request, Scheduler
from embferry.models import model_path

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load(model_path("shapes"), torch.float32)


def answer(model, **form) -> str:
    """Returns the greedy answer to a question, in a form."""
    prompt = model.prompts.build([{"role": "user", "content": "how many circles are there?"}])
    scheduler = Scheduler(model)
    scheduler.add(Request("a", prompt, SamplingParams(max_tokens=300), matcher=model.grammars.compile(**form)))
    outputs = []
    while scheduler.runnable():
        outputs += scheduler.step()
    assert outputs[-1].error is None
    assert outputs[-1].finish_reason == "stop"
    return "".join(output.text for output in outputs)


def test_a_choice(model):
    assert answer(model, choice=["two.*", "a (b) | c"]) in ("two.*", "a (b) | c")


def test_a_regular_expression(model):
    assert re.fullmatch(r"\d{3}-[xyz]+!", answer(model, regex=r"\d{3}-[xyz]{1,3}!"))


def test_a_json_schema(model):
    told = json.loads(answer(model, json_schema=SCHEMA))
    assert told.keys() == {"n", "ok"}
    assert 0 <= told["n"] <= 99


def test_compact_json_has_no_white_space(model):
    assert " " not in answer(model, json_schema=SCHEMA, compact=True)


def test_each_answer_has_its_own_state(model):
    matcher = model.grammars.compile(choice=["ab"])
    first, second = matcher.copy(), matcher.copy()
    for token in model.prompts.token_ids("ab"):
        first.accept(token)
    assert (first.is_complete, second.is_complete, matcher.is_complete) == (True, False, False)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(("},
        {"regex": "(?=a)b"},
        {"json_schema": {"type": "nope"}},
        {"json_schema": {"type": "array", "uniqueItems": True}},
        {"json_schema": False},
        {"json_schema": {"$ref": "http://127.0.0.1:9/schema"}},
        {"json_schema": {"allOf": [{"$ref": "#"}]}},
    ],
    ids=repr,
)
def test_a_form_that_cannot_be_compiled_is_refused(model, form):
    with pytest.raises(ParameterError):
        model.grammars.compile(**form).mask(model.grammars.vocabulary)


ENDLESS = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"allOf": [{"$ref": "#"}]},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
]


@pytest.mark.parametrize("schema", ENDLESS, ids=repr)
def test_a_schema_that_refers_to_itself_without_an_end_is_called_so(model, schema):
    with pytest.raises(ParameterError, match=r"refers to itself without an end.*\$ref"):
        model.grammars.compile(json_schema=schema)


def test_a_schema_may_refer_to_itself_with_an_end(model):
    matcher = model.grammars.compile(json_schema={"type": "array", "items": {"$ref": "#"}})
    assert matcher.mask(model.grammars.vocabulary).any()


def test_an_expression_that_nothing_matches_is_called_so(model):
    with pytest.raises(ParameterError, match="no text has the answer's form"):
        model.grammars.compile(regex=r"[^\s\S]")


def test_a_form_that_is_too_complex_ends_its_request_alone(model, monkeypatch):
    """The states that an answer may pass through are bounded, however many there are."""
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 50)
    prompt = model.prompts.build([{"role": "user", "content": "?"}])
    scheduler = Scheduler(model)
    params = SamplingParams(max_tokens=150, temperature=1.0, seed=1)
    for name, form in (("hard", {"regex": "(a|b)*a(a|b){90}c"}), ("easy", {"choice": ["yes", "no"]})):
        scheduler.add(Request(name, prompt, params, matcher=model.grammars.compile(**form)))
    outputs = []
    while scheduler.runnable():
        outputs += scheduler.step()
    assert isinstance(next(one for one in outputs if one.request_id == "hard" and one.is_last).error, ParameterError)
    assert "".join(one.text for one in outputs if one.request_id == "easy") in ("yes", "no")


def test_compiling_is_bounded(model):
    with pytest.raises(ParameterError, match="too many expressions"):
        follow(model.grammars.compile(regex="(.*a.{0,200}){5}c"), model.prompts.token_ids("ab" * 1000))


def test_the_work_of_the_first_mask_is_done_where_the_form_is_compiled(model, monkeypatch):
    """Llguidance expands a form when it is first asked which tokens may follow."""
    asked = []
    monkeypatch.setattr(grammar.Matcher, "mask", lambda _, vocabulary: asked.append(vocabulary))
    model.grammars.compile(regex="(a{999}){1000}")
    assert asked == [model.grammars.vocabulary]


def test_a_matcher_takes_no_more_memory_than_is_counted_for_it(model):
    """Sixteen characters took 170 MB. Its memory is not Python's, so the process of its own tells."""
    program = f"""
from transformers import AutoTokenizer
from embferry.engine.grammar import Grammars

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

tokenizer = AutoTokenizer.from_pretrained({str(model_path("shapes"))!r})
grammars = Grammars(tokenizer, len(tokenizer), frozenset({{2}}))
grammars.compile(regex="a")
before = resident()
kept = [grammars.compile(regex=f"(a{{{{{{n}}}}}}){{{{1000}}}}") for n in range(890, 900)]
print((resident() - before) // len(kept))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert grammar.MATCHER_BYTES / 4 < int(done.stdout) < 1.5 * grammar.MATCHER_BYTES


def follow(matcher: grammar.Matcher, tokens: list[int]) -> None:
    for token in tokens:
        matcher.mask(512)
        matcher.accept(token)


def test_without_llguidance_a_form_is_refused(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ParameterError, match="pip install"):
        Grammars(model.prompts.tokenizer, 512, frozenset({2})).compile(regex="a")
