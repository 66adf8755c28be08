"""The number of values of a JSON text is bounded before it is parsed."""

from __future__ import annotations

import json

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.json_bounds import MAX_VALUES, check_values
from embferry.serve.language.messages import DECODER
from embferry.serve.worker.errors import decoded

MANY = MAX_VALUES + 1
TOO_MANY = {
    "lists": b'{"messages":[' + b"[]," * MANY + b"[]]}",
    "nested lists": b'{"a":[' + b"[[],[]]," * MANY + b"1]}",
    "numbers": b'{"a":[' + b"1," * MANY + b"1]}",
    "members": b"{" + b'"a":1,' * MANY + b'"b":2}',
    "empty strings": b'{"a":[' + b'"",' * MANY + b'""]}',
    "strings with escaped quotes": b'{"a":[' + rb'"\",",' * MANY + b'""]}',
    "no JSON": b"[{," * MANY,
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_too_many_values_are_refused_before_they_are_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msgspec.json.decode", lambda body: pytest.fail("parsed"))
    with pytest.raises(ServeError, match="more than 250,000 values") as caught:
        parse_object(TOO_MANY[name])
    assert caught.value.code == "invalid_json"
    with pytest.raises(ServeError, match="more than 250,000 values"):
        decoded(DECODER, TOO_MANY[name])


@pytest.mark.parametrize(
    "text", [",[{" * MANY, '",' * MANY, "\\" * 99_999 + '"' + ",[" * MANY, '\n",[{' * MANY, "\\"], ids=range(5)
)
def test_commas_and_brackets_in_strings_are_no_values(text: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    assert parse_object(body)["messages"][0]["content"] == text


@pytest.mark.parametrize("end", [b"", b"\\", b"\\\\", b'\\"'])
def test_a_string_without_an_end_takes_no_time_out_of_proportion(end: bytes) -> None:
    check_values(b'{"a":"' + b'\\"' * 3_000_000 + b"," * MANY + end)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 1_000_000 + b"}"])
def test_deep_and_endless_values_are_refused(body: bytes) -> None:
    with pytest.raises(ServeError) as caught:
        parse_object(body)
    assert caught.value.code == "invalid_json"
