"""One kept embedding: a head that says what it is, and its bytes. Together they are a file of the safetensors format.

A head has one form only: it is read by writing it again from its own statements and comparing. So a head that was
changed anywhere but in the name of the model contradicts itself, its file name, the length of the file, or the digest.
Pure: no files, no threads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Meta

from embferry.protocol.errors import LayoutMismatch
from embferry.protocol.layout import Layout

FORMAT = "embferry 1"
METADATA = "__metadata__"
MAX_HEAD = 16 << 10
"""Bytes of a head at most, its length included: far more than the head of any layout that models have."""
MAX_TOKENS = 1 << 32
MAX_MODEL = 200
KEY_CHARACTERS = 64
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32", "uint8": "U8"}
"""Names of dtypes in the safetensors format."""
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8

Parts = Callable[[int, int], Iterable[memoryview | bytes]]
Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Damaged(Exception):  # noqa: N818  (it says what the entry is)
    """The bytes that were read are not the entry that was asked for."""


class Entry(msgspec.Struct, frozen=True):
    """The description of one kept embedding.

    Attributes:
        key: Names content and everything else that decides the embedding; 64 hexadecimal digits.
        layout: The fields of a token.
        tokens: Its rows.
        digest: :func:`digest_of` its bytes.
        model: For people: the model that made it. Printable ASCII.
    """

    key: Key
    layout: Layout
    tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    model: Annotated[str, Meta(max_length=MAX_MODEL, pattern=r"^[ -~]*\Z")] = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the embedding, without the head."""
        return self.tokens * self.layout.token_bytes

    def head(self) -> bytes:
        """Returns the head, to which the fields' bytes are appended one after the other."""
        said = {
            "format": FORMAT,
            "key": self.key,
            "layout": msgspec.json.encode(self.layout).decode(),
            "tokens": str(self.tokens),
            "digest": self.digest,
            "model": self.model,
        }
        tensors: dict[str, Any] = {}
        at = 0
        for field in self.layout.fields:
            end = at + self.tokens * field.token_bytes
            shape, offsets = [self.tokens, field.width], [at, end]
            tensors[field.name] = {"dtype": DTYPES[field.dtype], "shape": shape, "data_offsets": offsets}
            at = end
        text = json.dumps({METADATA: said, **tensors}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return _LENGTH.pack(len(text)) + text


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    key: str
    layout: str
    tokens: Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,9}\Z")]
    digest: str
    model: str


class _Head(msgspec.Struct):
    said: _Said = msgspec.field(name=METADATA)


_decoder = msgspec.json.Decoder(_Head)
_layouts = msgspec.json.Decoder(Layout)


def digest_of(layout: Layout, tokens: int, parts: Parts) -> str:
    """Returns the xxh3-128 of the shape and the bytes of an embedding, hexadecimal.

    Args:
        layout: The fields of a token.
        tokens: Its rows.
        parts: Yields the bytes of the embedding between two offsets. Its fields lie one after the other.
    """
    state, at = xxhash.xxh3_128(), 0
    for field in layout.fields:
        end = at + tokens * field.token_bytes
        state.update(f"{field.dtype} {tokens} {field.width}".encode())
        for part in parts(at, end):
            state.update(part)
        at = end
    return str(state.hexdigest())


def model_label(name: str) -> str:
    """Returns a model's name as an entry may have it."""
    return "".join(one if " " <= one <= "~" else "?" for one in name[:MAX_MODEL])


def checked(entry: Entry) -> Entry:
    """Returns an entry whose head can be written. Raises ValueError if it cannot."""
    try:
        entry.layout.validate()
        msgspec.convert(msgspec.to_builtins(entry), Entry)
    except (LayoutMismatch, msgspec.ValidationError) as error:
        raise ValueError(f"this embedding cannot be kept: {error}") from None
    if METADATA in (field.name for field in entry.layout.fields):
        raise ValueError(f"this embedding cannot be kept: a field has the name {METADATA}")
    if len(entry.head()) > MAX_HEAD:
        raise ValueError("this embedding cannot be kept: its layout has too many fields")
    return entry


def parse(start: bytes, total: int) -> tuple[Entry, int]:
    """Reads a head.

    Args:
        start: The first bytes, :data:`MAX_HEAD` of them if there are so many.
        total: The length of all.

    Returns:
        The entry, and the length of its head. ``total`` is the sum of both.

    Raises:
        Damaged: It is no head of ours, or it contradicts itself or ``total``.
    """
    if len(start) < _LENGTH.size:
        raise Damaged(f"it has only {len(start)} bytes")
    end = _LENGTH.size + _LENGTH.unpack_from(start)[0]
    if not _LENGTH.size < end <= min(len(start), MAX_HEAD):
        raise Damaged("its head is longer than the file, or than any head of ours")
    try:
        said = _decoder.decode(start[_LENGTH.size : end]).said
        layout = _layouts.decode(said.layout)
        layout.validate()
        plain = {"key": said.key, "layout": msgspec.to_builtins(layout), "tokens": int(said.tokens)}
        entry = msgspec.convert({**plain, "digest": said.digest, "model": said.model}, Entry)
    except (msgspec.MsgspecError, LayoutMismatch, UnicodeError, RecursionError) as error:
        raise Damaged(f"its head cannot be read: {error}") from None
    if entry.head() != start[:end]:
        raise Damaged("its head is not of the form that this version writes")
    if end + entry.nbytes != total:
        raise Damaged(f"it has {total} bytes where its head says {end + entry.nbytes}")
    return entry, end
