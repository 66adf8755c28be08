"""Embeddings to send: sizes, bytes, and the check that they arrive unchanged."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import xxhash

from embferry.protocol.layout import Field, Layout

from .contract import Bytes

LAYOUT = Layout((Field("input_embeddings", "bfloat16", 4096), Field("deepstack_embeddings", "bfloat16", 3 * 4096)))
"""The fields of Qwen3-VL-8B."""
TOKEN_BYTES = LAYOUT.token_bytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")
_SEED = 20
_WORD = 8
_ALIGNMENT = 64


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
    """Returns the known payload called ``text``, or one of that size, rounded to whole tokens.

    Raises:
        ValueError: ``text`` is not a size.
    """
    for payload in KNOWN:
        if text.replace(" ", "").lower() == payload.name.replace(" ", "").lower():
            return payload
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit <= 0:
        raise ValueError(f"{text!r} is not a size such as 67MB or 1MiB")
    return Payload(text.strip(), max(1, round(float(match[1]) * unit / TOKEN_BYTES)))


def empty(size: int) -> Bytes:
    """Returns an array that is aligned as PyTorch aligns its tensors.

    numpy's begin 16 bytes after a page. Where the kernel copies, from process to process or to and from a socket, its
    speed depends on whether source and target are aligned to each other.
    """
    array = np.empty(size + _ALIGNMENT, np.uint8)
    start = -array.ctypes.data % _ALIGNMENT
    return array[start : start + size]


def make(size: int) -> Bytes:
    """Returns ``size`` random bytes in private memory, the same in every process."""
    words = np.random.Generator(np.random.SFC64(_SEED)).integers(0, 1 << 64, -(-size // _WORD), dtype=np.uint64)
    array = empty(size)
    array[:] = words.view(np.uint8)[:size]
    return array


def stamp(source: Bytes, number: int) -> None:
    """Writes the round's number over the first bytes, so that the digest differs in each round."""
    source[:_WORD] = np.frombuffer(number.to_bytes(_WORD), np.uint8)


def digest(arrays: list[Bytes]) -> str:
    """Returns the xxh3-128 of the arrays, one after another."""
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(array.reshape(-1).data)
    return str(state.hexdigest())
