"""The fields of a request: each works, or is refused by name, or is named as one without effect."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.openai.completions import parse_completion
from embferry.serve.openai.constraints import constraint_of
from embferry.serve.openai.fields import CONSTRAINTS, LIMITED, NEUTRAL
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.request import ChatRequest, parse

MESSAGES = [{"role": "user", "content": "?"}]


def chat(**fields: Any) -> ChatRequest:
    return parse({"messages": MESSAGES, **fields})


def ignored(**fields: Any) -> str:
    seen = Ignored()
    parse({"messages": MESSAGES, **fields}, seen)
    return str(seen)


def refusal(**fields: Any) -> tuple[str, str | None]:
    body = {"messages": MESSAGES, **fields}
    with pytest.raises(ServeError) as caught:
        _ = parse(body), constraint_of(body, Ignored())
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"max_tokens": 100.0}, {"max_tokens": 100}),
        ({"max_tokens": 5, "max_completion_tokens": 7.0}, {"max_tokens": 7}),
        ({}, {"max_tokens": None}),
        ({"seed": 3.0}, {"seed": 3}),
        ({"stop": list("abcdef")}, {"stop": list("abcdef")}),
        ({"stop": None}, {"stop": []}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"top_k": 5.0}, {"top_k": 5}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {"5": 1, "7": -100.0}}, {"logit_bias": [(5, 1.0), (7, -100.0)]}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"stop_token_ids": [4.0, 5]}, {"stop_token_ids": (4, 5)}),
        ({"allowed_token_ids": [4]}, {"allowed_token_ids": (4,)}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"n": 2}, {"n": 2}),
    ],
)
def test_fields_that_work_reach_the_language_worker(fields: dict[str, Any], sampling: dict[str, Any]) -> None:
    given = chat(**fields).sampling(None)
    assert {name: given[name] for name in sampling} == sampling


def test_a_request_without_them_says_nothing_of_them() -> None:
    plain = {"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": []}
    assert chat().sampling(None) == plain
    everything_null = dict.fromkeys([*ChatRequest.model_fields, *LIMITED, *NEUTRAL, "response_format"])
    assert chat(**everything_null | {"messages": MESSAGES}).sampling(None) == plain


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": True}])
def test_stream_options(options: Any) -> None:
    assert chat(stream=True, stream_options=options).includes_usage == bool(options and options.get("include_usage"))


@pytest.mark.parametrize("model", [None, ""])
def test_a_model_may_be_missing(model: str | None) -> None:
    assert not chat(model=model).model


ASKS: dict[str, Any] = {
    "tools": [{"type": "function"}], "functions": [{}], "tool_choice": "required", "function_call": {"name": "f"},
    "modalities": ["text", "audio"], "audio": {"voice": "x"}, "prediction": {"type": "content"},
    "web_search_options": {"a": 1}, "reasoning_effort": "high", "verbosity": "low", "service_tier": "flex",
    "store": True, "best_of": 2, "length_penalty": 0.5, "bad_words": ["x"], "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 5, "prompt_logprobs": 0, "logprob_token_ids": [1], "documents": [{}],
    "chat_template": "x", "chat_template_kwargs": {"a": 1}, "media_io_kwargs": {"a": 1},
    "mm_processor_kwargs": {"a": 1}, "priority": 5, "kv_transfer_params": {"a": 1}, "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1}, "repetition_detection": {"a": 1}, "thinking_token_budget": 5, "stream_interval": 4,
    "guided_grammar": "x", "guided_whitespace_pattern": "x", "prompt_embeds": "x", "ebnf": "x", "structural_tag": "x",
    "stop_regex": "x", "lora_path": "x", "session_params": {"a": 1}, "custom_logit_processor": "x",
    "custom_params": {"a": 1},
}  # fmt: skip
"""Field → a value that asks for something that there is not. The others ask with true."""


@pytest.mark.parametrize("name", LIMITED)
def test_a_field_without_effect_is_refused_by_name(name: str) -> None:
    assert refusal(**{name: ASKS.get(name, True)}) == ("unsupported_value", name)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": None, "parallel_tool_calls": True},
        {"store": False, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "reasoning_effort": "none"},
        {"use_beam_search": False, "best_of": 1, "length_penalty": 1.0, "add_special_tokens": False, "echo": False},
        {"spaces_between_special_tokens": True, "priority": 0, "cache_salt": "x", "prompt_logprobs": None},
        {"return_hidden_states": False, "no_stop_trim": False, "separate_reasoning": True},
    ],
)
def test_a_value_that_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert ignored(**fields) == ""


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params", "prompt_embeds"])
@pytest.mark.parametrize("value", [{}, [], "", False, 0])
def test_a_field_that_only_routers_may_set_is_refused_also_when_it_is_empty(name: str, value: Any) -> None:
    assert refusal(**{name: value}) == ("unsupported_value", name)
    assert ignored(**{name: None}) == ""


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "allowed_token_ids", "messages"])
def test_the_words_of_an_error_are_not_those_of_python(name: str) -> None:
    with pytest.raises(ServeError) as caught:
        parse({"messages": MESSAGES, name: 5})
    assert "Input should be a list" in caught.value.detail
    assert "tuple" not in caught.value.detail


def test_unknown_fields_are_named() -> None:
    assert ignored(temprature=0.5, stream_option={}, x=None) == "temprature, stream_option"
    assert ignored(stream=True, stream_options={"include_usages": True}) == "stream_options.include_usages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 100.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -(10**300)}, "temperature"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ["x" * 1000] * 5}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 5000}, "stop_token_ids"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"model": 5}, "model"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"enum": ["x" * 70_000]}}}, "structured_outputs.json"),
        ({"guided_regex": "x" * 5000}, "guided_regex"),
        ({"guided_regex": "x", "guided_choice": ["x"]}, "guided_regex"),
        ({"guided_choice": ["x"] * 600}, "guided_choice"),
    ],
)
def test_values_that_are_wrong(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields) == ("invalid_request", param)


@pytest.mark.parametrize("value", [0, 0.0, False, "", [], 5])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_no_value_of_a_form_is_ignored_in_silence(name: str, value: Any) -> None:
    if (name, value) == ("guided_json_object", False) and value is False:
        assert constraint_of({name: value}, Ignored()) is None
    elif name in ("guided_json", "json_schema") and value is False:  # a schema, of which the worker says what is wrong
        read = constraint_of({name: value}, Ignored())
        assert read is not None
        assert read.value == {"json": False}
    else:
        code, param = refusal(**{name: value})
        assert (code in ("invalid_request", "unsupported_value"), param) == (True, name)


@pytest.mark.parametrize("name", ["json", "regex", "choice", "json_object"])
@pytest.mark.parametrize("value", [0, ""])
def test_no_wrong_value_within_a_form_is_ignored(name: str, value: Any) -> None:
    beside = {"regex": "a"} if name != "regex" else {"choice": ["a"]}
    at = f"structured_outputs.{name}"
    assert refusal(structured_outputs=beside | {name: value}) == ("invalid_request", at)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, {"json": {"type": "integer"}}),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"json": {"type": "object"}, "compact": True},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"json_schema": "{}"}, {"json": {}}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": False}}, {"json": False}),
        ({"structured_outputs": {"regex": "a", "json_object": False}}, {"regex": "a"}),
        ({"guided_json_object": True}, {"json": {"type": "object"}}),
    ],
)
def test_the_form_of_an_answer(fields: dict[str, Any], constraint: Any) -> None:
    seen = Ignored()
    read = constraint_of(fields, seen)
    assert (None if read is None else read.value) == constraint
    assert not seen


@pytest.mark.parametrize("name", ["grammar", "structural_tag", "whitespace_pattern", "disable_additional_properties"])
def test_other_forms_are_refused_by_name(name: str) -> None:
    given = {"structured_outputs": {"regex": "a", name: "x"}}
    assert refusal(**given) == ("unsupported_value", f"structured_outputs.{name}")


def test_fields_of_a_form_without_effect_are_named() -> None:
    seen = Ignored()
    constraint_of({"structured_outputs": {"regex": "a", "flags": 1}}, seen)
    constraint_of({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}, seen)
    constraint_of({"response_format": {"type": "text", "schema": {"type": "object"}}}, seen)
    constraint_of({"response_format": {"type": "json_object", "y": 1}}, seen)
    constraint_of({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "z": 1}}, seen)
    named = "structured_outputs.flags, response_format.json_schema.x, response_format.schema"
    assert str(seen) == f"{named}, response_format.y, response_format.z"
    parse({"messages": [{}], "stream": True, "stream_options": {"include_obfuscation": True}}, seen := Ignored())
    assert str(seen) == "stream_options.include_obfuscation"


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2], [[1, 2]]])
def test_prompts_without_a_chat_template(prompt: Any) -> None:
    request = parse_completion({"prompt": prompt}, Ignored())
    assert request.one_prompt in ("text", [1, 2])
    assert request.sampling(None)["max_tokens"] == 16


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [""], [1.5], [-1], [True], 5, {}, [[1], "a"]])
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(ServeError) as caught:
        _ = parse_completion({"prompt": prompt}, Ignored()).one_prompt
    assert caught.value.param == "prompt"
