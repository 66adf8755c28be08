"""A picture of the router's own, by which it learns whether an instance encodes at all."""

from __future__ import annotations

import base64
import secrets
import struct
import zlib

from embferry.serve.vllm.items import Item

SIDE = 56
"""The least width and height that every model takes, in pixels."""


def probe_picture() -> Item:
    """Returns a picture that no cache has: a PNG of one random colour."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    row = b"\0" + secrets.token_bytes(3) * SIDE
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(row * SIDE)), _chunk(b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return Item("image", secrets.token_hex(32), f"data:image/png;base64,{base64.b64encode(data).decode()}")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
