"""What is sent: embeddings of Qwen3-VL-8B, of several lengths."""

from __future__ import annotations

import re

import msgspec

from embferry.protocol.layout import Field, Layout

LAYOUT = Layout((Field("input_embeddings", "bfloat16", 4096), Field("deepstack_embeddings", "bfloat16", 3 * 4096)))
TOKEN_BYTES = LAYOUT.token_bytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


class Payload(msgspec.Struct, frozen=True):
    """An embedding of ``tokens`` tokens of :data:`LAYOUT`."""

    name: str
    tokens: int
    what: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tokens * TOKEN_BYTES


SMALL = Payload("1 MiB", 32, "one small picture")
IMAGE = Payload("67 MB", 2040, "a 1080p picture")
VIDEO = Payload("403 MB", 12300, "a minute of video")
KNOWN = (SMALL, IMAGE, VIDEO)


def parse(text: str) -> Payload:
    """The payload called ``text`` (``1MiB``, ``67MB``, ``403MB``), or one of that size, in whole tokens.

    :raises ValueError: not a size.
    """
    for payload in KNOWN:
        if text.replace(" ", "").lower() == payload.name.replace(" ", "").lower():
            return payload
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit <= 0:
        raise ValueError(f"{text!r} is not a size such as 67MB or 1MiB")
    return Payload(text.strip(), max(1, round(float(match[1]) * unit / TOKEN_BYTES)))
