"""An error names the place in the client's request, on every path that generates; nothing is dropped in silence."""

from __future__ import annotations

import codecs
from typing import Any

import pytest

from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.responses import ResponsesForm, parse_responses
from embferry.serve.router.asked import Asked, Read, read_chat, read_completion, read_responses

BAD = {"type": "image_url", "image_url": 5}
CHAT = {"messages": [{"role": "user", "content": "?"}]}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}


def refused(read: Read, body: dict[str, Any]) -> tuple[str, str]:
    """Returns the place of an error, and its text."""
    with pytest.raises(ServeError) as caught:
        read(body, Settings(), Ignored())
    return str(caught.value.param), caught.value.detail


def asked(read: Read, body: dict[str, Any]) -> Asked:
    return read(body, Settings(), Ignored())


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ([{"role": "user", "content": [BAD]}], "input[0].content[0].image_url"),
        ([{"role": "user", "content": "?"}, {"role": "no"}], "input[1].role"),
        ([{"type": "function_call_output", "call_id": "c", "output": 5}], "input[0].output"),
        ([{"type": "function_call_output", "call_id": "c", "output": [BAD]}], "input[0].output[0].image_url"),
        ([{"type": "function_call_output", "output": "x"}], "input[0].call_id"),
        ([{"type": "function_call", "call_id": "c", "arguments": "{}"}], "input[0].name"),
        ([{"type": "reasoning"}], "input[0].type"),
        ([{"type": ["x"]}], "input[0].type"),
        (["x"], "input[0]"),
        ([], "input"),
    ],
)
@pytest.mark.parametrize("instructions", [None, "be brief"])
def test_errors_of_a_conversation_name_the_item(given: Any, at: str, instructions: str | None) -> None:
    place, text = refused(read_responses, {"input": given, "instructions": instructions})
    assert place == at
    assert at in text


@pytest.mark.parametrize(
    ("form", "at"),
    [
        ({"type": "no"}, "text.format"),
        ({"type": "json_schema"}, "text.format.schema"),
        ({"type": "json_schema", "schema": 5}, "text.format.schema"),
    ],
)
def test_errors_of_a_form_name_the_field_of_the_path(form: Any, at: str) -> None:
    place, text = refused(read_responses, {"input": "?", "text": {"format": form}})
    assert (place, at in text) == (at, True)


def test_fields_of_items_without_effect_are_named() -> None:
    ignored = Ignored()
    items = [
        {"role": "user", "content": "?", "name": "n", "arguments": "{}", "output": "o", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "output": "o"},
    ]
    parse_responses({"input": items, "response_format": {"type": "json_object"}}, ignored)
    named = "response_format, input[0].name, input[0].arguments, input[0].output, input[1].output"
    assert str(ignored) == named  # text.format says the form at this path


def test_a_reply_repeats_the_metadata() -> None:
    request, _, _ = parse_responses({"input": "?", "metadata": {"a": "b"}}, Ignored())
    (created, *_) = ResponsesForm("m", request).opening()
    assert created["response"]["metadata"] == {"a": "b"}
    for wrong in ({"a": 1}, {"a": "x" * 513}, {"a" * 65: "b"}, {str(n): "" for n in range(17)}):
        with pytest.raises(ServeError, match="metadata"):
            parse_responses({"input": "?", "metadata": wrong}, Ignored())


@pytest.mark.parametrize(
    ("read", "body", "worker", "client"),
    [
        (read_chat, CHAT | {"max_tokens": 9}, "max_tokens", "max_tokens"),
        (read_chat, CHAT | {"max_completion_tokens": 9}, "max_tokens", "max_completion_tokens"),
        (read_responses, {"input": "?", "max_output_tokens": 9}, "max_tokens", "max_output_tokens"),
        (read_chat, CHAT | {"n": 9}, "n", "n"),
        (read_chat, CHAT | {"guided_regex": "a"}, "constraint", "guided_regex"),
        (read_chat, CHAT | {"response_format": {"type": "json_object"}}, "constraint", "response_format"),
        (read_responses, {"input": "?", "text": {"format": SCHEMA}}, "constraint", "text.format"),
        (read_completion, {"prompt": "?", "regex": "a"}, "constraint", "regex"),
        (read_responses, {"input": "?", "messages": [], "max_tokens": 5}, "max_tokens", "max_output_tokens"),
        (read_responses, {"input": "?", "messages": []}, "prompt", "input"),
        (read_chat, CHAT | {"prompt": "?"}, "prompt", "messages"),
        (read_chat, CHAT, None, None),
    ],
)
def test_errors_of_workers_name_what_the_client_has_written(
    read: Read, body: dict[str, Any], worker: str | None, client: str | None
) -> None:
    error = ServeError("invalid_parameter", "no", param=worker, status=400)
    asked(read, body).place(error)
    assert error.param == client


@pytest.mark.parametrize(
    ("read", "body"),
    [(read_chat, CHAT), (read_completion, {"prompt": "?"}), (read_responses, {"input": "?"})],
)
def test_a_prompt_that_is_too_long_is_named(read: Read, body: dict[str, Any]) -> None:
    error = ServeError("context_length_exceeded", "no", status=400)
    asked(read, body).place(error)
    assert error.param in body


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_object(codecs.BOM_UTF8 + b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("text", [rb"\ud83d", rb"x\uD83Dy", rb"\ud83d\u0041"])
def test_half_a_surrogate_pair_is_called_so(text: bytes) -> None:
    with pytest.raises(ServeError, match="half of a surrogate pair"):
        parse_object(b'{"a": "' + text + b'"}')
    assert parse_object(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
