"""The events of a language worker, checked: pure."""

from __future__ import annotations

from typing import Any

from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json

MAX_CHOICES = 128
"""Choices of a request."""
_MAX_COUNT, _MAX_SECONDS = 1 << 62, 1e9
_TYPES = ("token", "end", "error", "ping", "progress")


def parse_event(line: bytes) -> dict[str, Any]:
    """Returns the event in a line.

    Raises:
        ServeError: worker_failed; it is none.
    """
    try:
        event = read_json(line)
        if event["type"] not in _TYPES:
            raise ValueError
        if event["type"] in _VALID and not _VALID[event["type"]](event):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ServeError("worker_failed", f"the language worker sent a malformed event: {line[:200]!r}") from error
    return dict(event)


def _is_token(event: dict[str, Any]) -> bool:
    choice, text = event.get("choice", 0), event["text"]
    is_named = isinstance(choice, int) and 0 <= choice < MAX_CHOICES
    has_logprob = "logprob" in event
    is_right = not has_logprob or (
        isinstance(event["logprob"], float | int)
        and isinstance(event["piece"], str)
        and all(isinstance(piece, str) and isinstance(value, float | int) for piece, value in event["top"])
    )
    return isinstance(text, str) and isinstance(event["token_id"], int) and is_named and is_right


def _is_end(event: dict[str, Any]) -> bool:
    reasons = event.get("finish_reasons") or [event["finish_reason"]]
    return all(isinstance(reason, str) for reason in reasons) and isinstance(event["usage"], dict)


def _is_progress(event: dict[str, Any]) -> bool:
    counts = [event[name] for name in ("tokens", "total_tokens", "transfers", "bytes")]
    times = [event[name] for name in ("seconds", "ago") if name in event]
    are_counts = all(type(count) is int and 0 <= count <= _MAX_COUNT for count in counts)
    are_times = len(times) != 1 and all(type(one) in (int, float) and 0 <= one <= _MAX_SECONDS for one in times)
    return are_counts and are_times and isinstance(event["transport"], str)


_VALID = {"token": _is_token, "end": _is_end, "progress": _is_progress}
"""Event → a test for its fields."""
