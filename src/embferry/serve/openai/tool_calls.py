"""The tool calls of a history, which chat templates take with their arguments as objects."""

from __future__ import annotations

from typing import Any

import msgspec

from embferry.serve.errors import ServeError
from embferry.serve.json_bounds import check_values
from embferry.serve.openai.ignored import EMPTY, Ignored

MAX_ARGUMENTS = 1_000_000
"""Characters of the arguments of all calls of a request: each is parsed, and its objects take many times the memory."""
MAX_DEPTH = 64
"""Levels of the arguments of a call."""


class ToolCalls:
    """Reads the tool calls of one request.

    Args:
        ignored: gets arguments that no chat template can use: those that are not a JSON object. vLLM drops them too,
            because the call stands in the history, and refusing it would refuse every later request as well.
    """

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self._left = MAX_ARGUMENTS

    def of(self, message: dict[str, Any], at: str) -> dict[str, Any]:
        """Returns ``{"tool_calls": […]}`` of a message, or an empty object if it has none.

        Raises:
            ServeError: invalid_request.
        """
        calls, name, earlier = message.get("tool_calls"), "tool_calls", message.get("function_call")
        if calls in EMPTY and earlier not in EMPTY:  # OpenAI's earlier form of a single call
            calls, name = [{"function": earlier}], "function_call"
        elif earlier not in EMPTY:
            self._ignored.add(f"{at}.function_call")
        if calls in EMPTY:
            return {}
        if not isinstance(calls, list):
            raise _wrong(f"{at}.{name}", "must be a list of calls")
        read = [self._call(call, f"{at}.{name}" + f"[{n}]" * (name == "tool_calls")) for n, call in enumerate(calls)]
        return {"tool_calls": read}

    def _call(self, call: Any, at: str) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type") not in (None, "function"):
            raise _wrong(at, 'must be {"type": "function", "function": {"name", "arguments"}}')
        name, id = function.get("name"), call.get("id")
        if not isinstance(name, str) or not isinstance(id, str | None):
            raise _wrong(f"{at}.function.name" if isinstance(id, str | None) else f"{at}.id", "must be a string")
        self._ignored.note(call, ("id", "type", "function", "index"), at)
        self._ignored.note(function, ("name", "arguments"), f"{at}.function")
        arguments = self._arguments(function.get("arguments"), f"{at}.function.arguments")
        kept: dict[str, Any] = {} if id is None else {"id": id}
        return kept | {"type": "function", "function": {"name": name, "arguments": arguments}}

    def _arguments(self, value: Any, at: str) -> dict[str, Any]:
        if isinstance(value, str):
            self._left -= len(value)
            if self._left < 0:
                why = f"{at}: the arguments of all calls have more than {MAX_ARGUMENTS:,} characters"
                raise ServeError("context_length_exceeded", why, param=at, status=400)
            value = _parsed(value)
        if not isinstance(value, dict):
            if value not in (None, ""):
                self._ignored.add(at)
            return {}
        if _is_deeper(value, MAX_DEPTH):
            raise _wrong(at, f"must have at most {MAX_DEPTH} levels")
        return value


def _parsed(text: str) -> Any:
    """Returns the value of a JSON text, or the text if it is none."""
    body = text.encode(errors="replace")
    check_values(body)
    try:
        return msgspec.json.decode(body) if text else None
    except (ValueError, RecursionError):
        return text


def _is_deeper(value: Any, levels: int) -> bool:
    """Returns whether a JSON value has more levels than ``levels``."""
    level = [value]
    for _ in range(levels):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return False
        level = [inner for one in containers for inner in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in level)


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)
