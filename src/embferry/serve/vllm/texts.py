"""The texts of a request to vLLM, which are counted before an instance renders and tokenizes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embferry.serve.vllm.media_parts import MediaPart

_SOUNDS = ("audio_url", "input_audio")
"""Fields of a part that hold a file, beside those of pictures and videos."""


def count_characters(request: dict[str, Any], media: Sequence[MediaPart]) -> int:
    """Returns the number of characters of all texts of a request, wherever they stand: a chat template may use any.

    Args:
        request: the client's request.
        media: its pictures and videos, whose URLs do not count. The files of sounds do not count either.
    """
    files = sum(len(part.url) for part in media)
    sounds = sum(_characters(part.get(name)) for part in _parts(request) for name in _SOUNDS)
    return _characters(request) - files - sounds


def _characters(value: Any) -> int:
    """Returns the number of characters of all strings in a JSON value, names of fields included."""
    count, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            count += len(one)
        elif isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
    return count


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
