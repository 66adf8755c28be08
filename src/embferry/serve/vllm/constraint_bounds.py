"""Bounds on the forms that clients ask answers to have: vLLM compiles them in the process that answers everyone.

A short schema or regular expression can ask for an automaton of gigabytes: ``minItems`` of 10⁷ takes vLLM 0.32 seconds
and 2 GB, of 10⁹ all memory. What is bounded here is what grows so; whether a form can be compiled, vLLM says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from embferry.serve.errors import ServeError
from embferry.serve.openai.constraints import MAX_CHOICE_CHARACTERS, MAX_CHOICES, MAX_SCHEMA_BYTES

MAX_BYTES = 1 << 20
"""Bytes of a field with schemas: there may be many tools."""
MAX_COUNT = 1_000_000
"""The largest count in a schema: of items, characters or fields, times those of what they are in."""
MAX_REPEATED = 10_000
"""Atoms of a regular expression or grammar with their repetitions."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains")
_TEXTS = ("regex", "grammar", "structural_tag")
_WITH_SCHEMAS = ("response_format", "tools", "text")
"""Fields of a request with schemas somewhere in them."""


def check_constraints(request: dict[str, Any]) -> None:
    """Checks the forms in a request.

    Raises:
        ServeError: invalid_request, with the field in ``param``.
    """
    if (outputs := request.get("structured_outputs")) is not None:
        _check_outputs(outputs)
    for name in _WITH_SCHEMAS:
        if isinstance(request.get(name), dict | list):
            _check_counts(request[name], name)
    for schema, at in _schemas(request):
        _check_references(schema, at)


def _check_outputs(outputs: Any) -> None:
    at = "structured_outputs"
    if not isinstance(outputs, dict):
        raise _wrong(at, "must be an object with one of json, regex, choice, grammar, json_object and structural_tag")
    if (given := outputs.get("json")) is not None:
        schema = _parsed(given, f"{at}.json")
        _check_counts(schema, f"{at}.json")
        _check_references(schema, f"{at}.json")
    for name in _TEXTS:
        if isinstance(text := outputs.get(name), str):
            _check_text(text, f"{at}.{name}")
    choice = outputs.get("choice")
    if isinstance(choice, list):
        characters = sum(len(one) for one in choice if isinstance(one, str))
        if len(choice) > MAX_CHOICES or characters > MAX_CHOICE_CHARACTERS:
            most = f"at most {MAX_CHOICES} texts, of together at most {MAX_CHOICE_CHARACTERS:,} characters"
            raise _wrong(f"{at}.choice", f"must have {most}")


def _schemas(request: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yields the whole schemas beside ``structured_outputs``, and where each stands."""
    text, tools = request.get("text"), request.get("tools")
    forms = {"response_format": request.get("response_format")}
    forms["text.format"] = text.get("format") if isinstance(text, dict) else None
    for at, form in forms.items():
        yield from _fields(form, at, "json_schema", "schema")
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        yield from _fields(tool, f"tools[{number}]", "function", "parameters")


def _fields(outer: Any, at: str, inner: str, name: str) -> Iterator[tuple[Any, str]]:
    """Yields the field ``name`` of an object, and that of the object in its field ``inner``."""
    if isinstance(outer, dict):
        yield outer.get(name), f"{at}.{name}"
        if isinstance(nested := outer.get(inner), dict):
            yield nested.get(name), f"{at}.{inner}.{name}"


def _parsed(schema: Any, at: str) -> Any:
    """Returns a schema, which may be written in a string."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema.encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise _wrong(at, f"is not JSON: {error}") from error


def _check_counts(value: Any, at: str) -> None:
    """Checks the counts and patterns of all schemas in a value."""
    if len(msgspec.json.encode(value)) > MAX_BYTES:
        raise _wrong(at, f"has more than {MAX_BYTES:,} bytes")
    left = [(value, 1.0)]
    while left:
        node, times = left.pop()
        if isinstance(node, list):
            left += [(one, times) for one in node]
        if not isinstance(node, dict):
            continue
        counts = [count for name in _COUNTS if isinstance(count := node.get(name), int | float)]
        times *= max([1.0, *(float(min(count, MAX_COUNT + 1)) for count in counts)])
        if times > MAX_COUNT:
            named = ", ".join(name for name in _COUNTS if name in node)
            raise _wrong(at, f"counts to more than {MAX_COUNT:,} ({named})")
        if isinstance(pattern := node.get("pattern"), str):
            _check_text(pattern, at, "has a pattern that ")
        left += [(one, times) for one in node.values()]


def _check_references(schema: Any, at: str) -> None:
    """Checks that each reference leads to something else than references alone. Those to elsewhere are vLLM's to judge.

    Each name is followed once, so that the work grows with the schema and no faster.
    """
    sound: set[str] = set()
    for node in _objects(schema):
        passed: set[str] = set()
        current: Any = node
        while isinstance(current, dict) and isinstance(name := current.get("$ref"), str) and name.startswith("#"):
            if name in passed:
                raise _wrong(at, f"has a $ref that leads back to itself ({name[:80]})")
            if name in sound:
                break
            passed.add(name)
            current = _resolved(schema, name)
        sound |= passed


def _resolved(top: Any, reference: str) -> Any:
    """Returns what a JSON pointer (RFC 6901) in a fragment leads to; None if there is nothing."""
    found = top
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def _check_text(text: str, at: str, which: str = "") -> None:
    if len(text) > MAX_SCHEMA_BYTES:
        raise _wrong(at, f"{which}has more than {MAX_SCHEMA_BYTES:,} characters")
    if repeated(text) > MAX_REPEATED:
        raise _wrong(at, f"{which}repeats its parts more than {MAX_REPEATED:,} times in all")


def repeated(text: str) -> int:
    """Returns the atoms of a regular expression with their repetitions, about; beyond the bound, any larger number.

    A class counts as one atom, a group as those in it. ``*`` and ``+`` add none: an automaton repeats without growing.
    """
    sizes, last, at = [0], 0, 0
    while at < len(text):
        one = text[at]
        at += 1
        if one == "(":
            sizes.append(0)
            last = 0
            continue
        if one == ")":
            last = sizes.pop() if len(sizes) > 1 else last
        elif one == "{" and (found := _counts(text, at)) is not None:
            most, at = found
            sizes[-1] += last * (max(most, 1) - 1)
            last *= max(most, 1)
            if sizes[-1] > MAX_REPEATED:
                return sizes[-1]
            continue
        elif one in "*+?|^$":
            continue
        else:
            at = _after_atom(text, at - 1)
            last = 1
        sizes[-1] += last
    return max(sum(sizes), 0)


def _counts(text: str, at: int) -> tuple[int, int] | None:
    """Returns the largest count of ``{n}``, ``{n,}`` or ``{n,m}`` and where it ends; None if there is none."""
    end = text.find("}", at, at + 32)
    numbers = text[at:end].replace(" ", "").split(",") if end >= 0 else [""]
    if len(numbers) > 2 or not all(number.isdecimal() or not number for number in numbers) or not any(numbers):
        return (MAX_REPEATED + 2, len(text)) if end < 0 and text[at : at + 32].isdecimal() else None
    return max(int(number or 0) for number in numbers), end + 1


def _after_atom(text: str, at: int) -> int:
    """Returns where the atom at ``at`` ends: a class, an escape or one character."""
    if text[at] == "\\":
        return at + 2
    if text[at] != "[":
        return at + 1
    end = at + 2 + text.startswith("^", at + 1)  # a ] that comes first is one of the class
    while end < len(text) and text[end] != "]":
        end += 2 if text[end] == "\\" else 1
    return end + 1


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yields all objects in a JSON value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left += one.values()
        elif isinstance(one, list):
            left += one


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)
