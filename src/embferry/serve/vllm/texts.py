"""The texts of a request to vLLM, which are counted before an instance renders and tokenizes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embferry.serve.text_limit import count_characters
from embferry.serve.vllm.media_parts import MediaPart

_SOUNDS = ("audio_url", "input_audio")
"""Fields of a part that hold a sound."""


def characters_of(request: dict[str, Any], media: Sequence[MediaPart]) -> int:
    """Returns the number of characters of all texts of a request, wherever they stand: a chat template may use any.

    Args:
        request: the client's request.
        media: its pictures, videos and sounds, whose URLs do not count. Nothing in the field of a sound does.
    """
    files = sum(len(part.url) for part in media if part.kind != "audio")
    sounds = sum(count_characters(part.get(name)) for part in _parts(request) for name in _SOUNDS)
    return count_characters(request) - files - sounds


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
