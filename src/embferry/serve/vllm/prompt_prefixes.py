"""Digests of what stands before the end of a picture in the prompt of a request.

If an instance has answered a request with the same, its prefix cache may cover the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import MediaPart

_BESIDE = (
    "model", "tools", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "cache_salt",
    "add_special_tokens", "reasoning_effort", "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip
"""Fields beside the messages that may change the beginning of a prompt."""


def prefixes_of(request: dict[str, Any], media: Sequence[tuple[MediaPart, Item]]) -> dict[str, bytes]:
    """Returns, by the name of each item, a digest of all that is before the end of its last place.

    Args:
        request: a client's request.
        media: its pictures and videos, with their content.
    """
    items = {(part.message, part.part): item for part, item in media}
    found: dict[str, bytes] = {}
    state = hashlib.sha256(_line([request.get(name) for name in _BESIDE]))
    for number, message in enumerate(request["messages"][: max(items)[0] + 1]):
        content = message.get("content") if isinstance(message, dict) else message
        state.update(_line({**message, "content": None} if isinstance(message, dict) else None))
        for position, part in enumerate(content if isinstance(content, list) else [content]):
            item = items.get((number, position))
            state.update(_line(part if item is None else item.uuid))
            if item is not None:
                found[item.uuid] = state.digest()
    return found


def _line(value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"
