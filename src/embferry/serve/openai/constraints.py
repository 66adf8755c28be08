"""The form that an answer must have: a JSON schema, a regular expression, or one of several texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.openai.fields import CONSTRAINTS
from embferry.serve.openai.ignored import Ignored

MAX_SCHEMA_BYTES = 64 << 10
MAX_REGEX_CHARACTERS = 4096
MAX_CHOICES, MAX_CHOICE_CHARACTERS = 512, 16 << 10
_ANY_OBJECT = {"type": "object"}
_SCHEMA_FIELDS = frozenset({"schema", "name", "description", "strict", "type"})
_STRUCTURED = frozenset({"json", "regex", "choice", "json_object", "disable_any_whitespace"})
_STRUCTURED_REFUSED = ("grammar", "structural_tag", "whitespace_pattern", "disable_additional_properties")


def constraint_of(body: Mapping[str, Any], ignored: Ignored) -> dict[str, Any] | None:
    """Returns the constraint of a request, with one of ``json``, ``regex`` and ``choice``; None if it has none.

    Args:
        body: the request. OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_…``, and SGLang's
            ``regex`` and ``json_schema`` say the same.
        ignored: gets the fields that have no effect.

    Raises:
        ServeError: invalid_request, unsupported_value.
    """
    given = {name: body[name] for name in CONSTRAINTS if body.get(name) not in (None, False)}
    read = {name: found for name, value in given.items() if (found := _read(name, value, ignored)) is not None}
    if len(read) > 1:
        raise _wrong(next(iter(read)), f"cannot be combined with {', '.join(list(read)[1:])}: an answer has one form")
    return next(iter(read.values()), None)


def _read(name: str, value: Any, ignored: Ignored) -> dict[str, Any] | None:
    if name == "response_format":
        return _response_format(value, ignored)
    if name == "structured_outputs":
        return _structured_outputs(value, ignored)
    kind = {"guided_json": "json", "json_schema": "json", "guided_choice": "choice", "guided_json_object": "object"}
    return _checked(kind.get(name, "regex"), value, name)


def _response_format(value: Any, ignored: Ignored) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": _ANY_OBJECT}
    if kind != "json_schema":
        why = f"response_format={shown(value, 80)} is not supported (text, json_object, json_schema)"
        raise ServeError("unsupported_value", why, param="response_format")
    at = "response_format.json_schema"
    described = value.get("json_schema")
    if not isinstance(described, dict):
        described = value  # as in /v1/responses, where the schema stands beside the type
    if "schema" not in described:
        raise _wrong(f"{at}.schema", "is missing")
    for name in described:
        if name not in _SCHEMA_FIELDS:
            ignored.add(f"{at}.{name}")
    return _checked("json", described["schema"], f"{at}.schema")


def _structured_outputs(value: Any, ignored: Ignored) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise _wrong("structured_outputs", "must be an object with one of json, regex, choice and json_object")
    for name in _STRUCTURED_REFUSED:
        if value.get(name):
            why = f"structured_outputs.{name} is not supported (json, regex, choice, json_object)"
            raise ServeError("unsupported_value", why, param=f"structured_outputs.{name}")
    for name in value:
        if name not in (*_STRUCTURED, *_STRUCTURED_REFUSED):
            ignored.add(f"structured_outputs.{name}")
    kinds = {"json": "json", "regex": "regex", "choice": "choice", "json_object": "object"}
    found = [name for name in kinds if value.get(name) not in (None, False)]
    if len(found) != 1:
        raise _wrong("structured_outputs", "must have one of json, regex, choice and json_object")
    constraint = _checked(kinds[found[0]], value[found[0]], f"structured_outputs.{found[0]}")
    return constraint | ({"compact": True} if value.get("disable_any_whitespace") else {})


def _checked(kind: str, value: Any, at: str) -> dict[str, Any]:
    """Returns a constraint of bounded size. Whether it can be compiled, the language worker finds."""
    if kind == "object":
        return {"json": _ANY_OBJECT}
    if kind == "json":
        return {"json": _schema(value, at)}
    if kind == "regex":
        if not isinstance(value, str) or not 0 < len(value) <= MAX_REGEX_CHARACTERS:
            raise _wrong(at, f"must be a regular expression of 1 to {MAX_REGEX_CHARACTERS:,} characters")
        return {"regex": value}
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise _wrong(at, "must be a list of texts, none of them empty")
    if not 0 < len(value) <= MAX_CHOICES or sum(map(len, value)) > MAX_CHOICE_CHARACTERS:
        raise _wrong(
            at, f"must have 1 to {MAX_CHOICES} texts, of together at most {MAX_CHOICE_CHARACTERS:,} characters"
        )
    return {"choice": value}


def _schema(value: Any, at: str) -> Any:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value[: MAX_SCHEMA_BYTES + 1].encode(errors="replace"))
        except (ValueError, RecursionError) as error:
            raise _wrong(at, f"is not JSON: {error}") from error
    if not isinstance(value, dict | bool):
        raise _wrong(at, "must be a JSON schema")
    try:
        nbytes = len(msgspec.json.encode(value))
    except (ValueError, RecursionError) as error:
        raise _wrong(at, f"cannot be read: {error}") from error
    if nbytes > MAX_SCHEMA_BYTES:
        raise _wrong(at, f"has {nbytes:,} bytes; at most {MAX_SCHEMA_BYTES:,} are read")
    return value


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)
