"""Forms of answers that take vLLM gigabytes to compile are refused before an instance gets them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.vllm.constraint_bounds import MAX_REPEATED, check_constraints, repeated
from tests.serve.vllm.stubs import Stub, request, routed, text

ITEMS = {"type": "array", "minItems": 10**9}


def nested(depth: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found, "minItems": count}
    return found


def json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


REFUSED: dict[str, dict[str, Any]] = {
    "minItems": {"structured_outputs": {"json": ITEMS}},
    "in a string": {"structured_outputs": {"json": '{"type": "array", "minItems": 1e9}'}},
    "no JSON": {"structured_outputs": {"json": "{"}},
    "nested": json_schema(nested(3, 1000)),
    "maxLength": json_schema({"properties": {"a": {"type": "string", "maxLength": 10**8}}}),
    "of a tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": ITEMS}}]},
    "of /v1/responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": ITEMS}}},
    "pattern": json_schema({"type": "string", "pattern": "(a{999}){1000}"}),
    "regex": {"structured_outputs": {"regex": "a{1000000}"}},
    "nested regex": {"structured_outputs": {"regex": "((a{100}){100}){100}"}},
    "cut count": {"structured_outputs": {"regex": "a{" + "9" * 40}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "a"{1000000}'}},
    "many choices": {"structured_outputs": {"choice": [str(one) for one in range(100_000)]}},
    "refers to itself": {"structured_outputs": {"json": {"$ref": "#"}}},
    "refer to each other": json_schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "of a tool, to itself": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]},
    "of /v1/responses, to itself": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#"}}}},
    "in a structural tag": {"response_format": {"type": "structural_tag", "structures": [{"schema": ITEMS}]}},
    "a list": {"structured_outputs": []},
    "a number": {"structured_outputs": 5},
    "a text": {"structured_outputs": "x"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_too_much_is_refused(name: str) -> None:
    with pytest.raises(ServeError) as caught:
        check_constraints(REFUSED[name])
    assert (caught.value.code, caught.value.http_status) == ("invalid_request", 400)
    assert re.split(r"[.\[]", str(caught.value.param))[0] in REFUSED[name]


def chain(length: int, last: str) -> dict[str, Any]:
    links = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(length)}
    return json_schema({"$defs": links | {str(length): {"$ref": last}}, "$ref": "#/$defs/0"})


def test_a_long_chain_of_references_is_followed_once() -> None:
    """Once for each reference would take hours."""
    check_constraints(chain(30_000, "https://example.org/schema"))
    with pytest.raises(ServeError, match="leads back to itself"):
        check_constraints(chain(30_000, "#/$defs/15000"))


TREE = {"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"}
TAKEN: dict[str, dict[str, Any]] = {
    "counts": json_schema(nested(2, 1000)),
    "a field of that name": json_schema({"properties": {"minItems": {"type": "integer"}}}),
    "a tree": json_schema(TREE),
    "an unknown $ref": json_schema({"$ref": "https://example.org/schema"}),
    "a missing $ref": json_schema({"$ref": "#/nothing"}),
    "a regex": {"structured_outputs": {"regex": r"[a-z]{3,20}@\w+(\.[a-z]{2,63}){1,3}"}},
    "no repetition": {"structured_outputs": {"regex": "a{b}[{]{2}"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "none": {"structured_outputs": None, "response_format": {"type": "json_object"}, "tools": None, "text": "x"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_people_send_is_taken(name: str) -> None:
    check_constraints(TAKEN[name])


@pytest.mark.parametrize(
    ("regex", "count"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("(ab){2,5}c", 11),
        ("[abc]{4}", 4),
        (r"\{a{2}", 3),
        ("(a{3}b){2}", 8),
        ("[]{9}]", 1),
    ],
)
def test_atoms_are_counted_with_their_repetitions(regex: str, count: int) -> None:
    assert repeated(regex) == count


@pytest.mark.parametrize("regex", [")" * 5000, "(" * 5000, "{" * 5000, "[" * 5000, "\\", "a{0}", "(a|b)*{3}"])
def test_a_malformed_expression_is_left_to_vllm(regex: str) -> None:
    assert 0 <= repeated(regex) <= MAX_REPEATED


@pytest.mark.asyncio
async def test_the_instance_gets_nothing_of_it() -> None:
    async with routed(Stub("e", "encode"), language := Stub("l", "language")) as router:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
            answer = await router.post(path, request(text(), structured_outputs={"json": ITEMS}))
            assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert not language.requests
