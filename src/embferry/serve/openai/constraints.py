"""The form that an answer must have: a JSON schema, a regular expression, or one of several texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.openai.fields import CONSTRAINTS
from embferry.serve.openai.ignored import Ignored

MAX_SCHEMA_BYTES = 64 << 10
MAX_REGEX_CHARACTERS = 4096
MAX_CHOICES, MAX_CHOICE_CHARACTERS = 512, 16 << 10
RESPONSE_FORMAT = "response_format"
_ANY_OBJECT = {"type": "object"}
_SCHEMA_FIELDS = frozenset({"schema", "name", "description", "strict", "type"})
_STRUCTURED = frozenset({"json", "regex", "choice", "json_object", "disable_any_whitespace"})
_STRUCTURED_REFUSED = ("grammar", "structural_tag", "whitespace_pattern", "disable_additional_properties")


class Constrained(NamedTuple):
    """The form of an answer.

    Attributes:
        value: has one of ``json``, ``regex`` and ``choice``.
        param: the place in the request, for errors.
    """

    value: dict[str, Any]
    param: str


def constraint_of(body: Mapping[str, Any], ignored: Ignored, format_at: str = RESPONSE_FORMAT) -> Constrained | None:
    """Returns the form that the answer to a request must have; None if it may have any.

    Args:
        body: the request. OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_…``, and SGLang's
            ``regex`` and ``json_schema`` say the same.
        ignored: gets the fields that have no effect.
        format_at: where the client has written what ``body`` has as ``response_format``.

    Raises:
        ServeError: invalid_request, unsupported_value.
    """
    given = {name: body[name] for name in CONSTRAINTS if body.get(name) is not None}
    places = {name: format_at if name == RESPONSE_FORMAT else name for name in given}
    read = {places[name]: one for name, value in given.items() if (one := _read(name, value, ignored, places[name]))}
    if len(read) > 1:
        raise _wrong(next(iter(read)), f"cannot be combined with {', '.join(list(read)[1:])}: an answer has one form")
    return next((Constrained(value, param) for param, value in read.items()), None)


def _read(name: str, value: Any, ignored: Ignored, at: str) -> dict[str, Any] | None:
    if name == RESPONSE_FORMAT:
        return _response_format(value, ignored, at)
    if name == "structured_outputs":
        return _structured_outputs(value, ignored)
    kind = {"guided_json": "json", "json_schema": "json", "guided_choice": "choice", "guided_json_object": "object"}
    return _checked(kind.get(name, "regex"), value, name)


def _response_format(value: Any, ignored: Ignored, at: str) -> dict[str, Any] | None:
    """Reads OpenAI's field. A schema stands beside the type in ``/v1/responses``, and where json_object has one."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        why = f"{at}={shown(value, 80)} is not supported (text, json_object, json_schema)"
        raise ServeError("unsupported_value", why, param=at)
    nested = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(nested, dict):
        ignored.note(value, ("type", "json_schema"), at)
        value = nested
    if isinstance(nested, dict) or (kind == "json_schema" and at == RESPONSE_FORMAT and "schema" not in value):
        at = f"{at}.json_schema"
    ignored.note(value, ("type",) if kind == "text" else _SCHEMA_FIELDS, at)
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema") is None:
        return {"json": _ANY_OBJECT}
    if "schema" not in value:
        raise _wrong(f"{at}.schema", "is missing")
    return _checked("json", value["schema"], f"{at}.schema")


def _structured_outputs(value: Any, ignored: Ignored) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise _wrong("structured_outputs", "must be an object with one of json, regex, choice and json_object")
    for name in _STRUCTURED_REFUSED:
        if value.get(name):
            why = f"structured_outputs.{name} is not supported (json, regex, choice, json_object)"
            raise ServeError("unsupported_value", why, param=f"structured_outputs.{name}")
    ignored.note(value, (*_STRUCTURED, *_STRUCTURED_REFUSED), "structured_outputs")
    kinds = {"json": "json", "regex": "regex", "choice": "choice", "json_object": "object"}
    given = {name: value[name] for name in kinds if value.get(name) is not None}
    read = [one for name, form in given.items() if (one := _checked(kinds[name], form, f"structured_outputs.{name}"))]
    if len(read) != 1:
        raise _wrong("structured_outputs", "must have one of json, regex, choice and json_object")
    return read[0] | ({"compact": True} if value.get("disable_any_whitespace") else {})


def _checked(kind: str, value: Any, at: str) -> dict[str, Any] | None:
    """Returns a constraint of bounded size. Whether it can be compiled, the language worker finds.

    It is None for ``json_object: false``, which asks for nothing. Any other false or zero is a wrong value.
    """
    if kind == "object":
        if not isinstance(value, bool):
            raise _wrong(at, "must be true or false")
        return {"json": _ANY_OBJECT} if value else None
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
