"""Sounds in requests to the stubs, and what encoders say of items."""

from __future__ import annotations

import base64
from typing import Any

METADATA: dict[str, dict[str, Any]] = {
    "image_url": {"image_grid_thw": [[1, 12, 16]]},
    "video_url": {"video_grid_thw": [2, 4, 4]},
    "audio_url": {"audio_num_tokens": [25]},
}
"""Metadata of an item, by the type of its part."""


def wav(content: bytes = b"a sound") -> bytes:
    """Returns the beginning of a WAV file, with ``content`` where its samples would be."""
    return b"RIFF....WAVE" + content


def sound(content: bytes = b"a sound", **more: Any) -> dict[str, Any]:
    url = f"data:audio/wav;base64,{base64.b64encode(wav(content)).decode()}"
    return {"type": "audio_url", "audio_url": {"url": url}, **more}
