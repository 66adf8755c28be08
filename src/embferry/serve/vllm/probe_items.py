"""A picture and a sound of the router's own, by which it learns whether an instance encodes at all."""

from __future__ import annotations

import base64
import secrets
import struct
import zlib

from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import Kind

SIDE = 56
"""The least width and height that every model takes, in pixels."""
RATE, SAMPLES = 16_000, 4000
"""Samples a second, as the models take them; samples of the whole sound."""


def probe_item(kind: Kind) -> Item:
    """Returns an item that no cache has. It tests an encoder that failed on an item of this kind."""
    return probe_sound() if kind == "audio" else probe_picture()


def probe_picture() -> Item:
    """Returns a picture that no cache has: a PNG of one random colour."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    row = b"\0" + secrets.token_bytes(3) * SIDE
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(row * SIDE)), _chunk(b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return Item("image", secrets.token_hex(32), f"data:image/png;base64,{base64.b64encode(data).decode()}")


def probe_sound() -> Item:
    """Returns a sound that no cache has: a WAV file of random samples."""
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + head + struct.pack("<4sI", b"data", 2 * SAMPLES) + secrets.token_bytes(2 * SAMPLES)
    data = struct.pack("<4sI", b"RIFF", len(body)) + body
    return Item("audio", secrets.token_hex(32), f"data:audio/wav;base64,{base64.b64encode(data).decode()}")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
