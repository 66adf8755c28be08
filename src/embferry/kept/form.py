"""The form of a file: a head, the records of the chunks that have arrived, and the rows. Pure.

The head never changes. A record is written behind its predecessor once the rows of its chunk are in the file, and never
changes either. So whenever its process is killed, a file says nothing that is not so: what has been written of the next
record does not have its own checksum, and counts as not written.

A reader knows what it looks for, so it parses no head: it writes the one that it wants and compares.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import xxhash

from embferry.memory.buffers import checksum
from embferry.protocol.layout import ALIGNMENT, Layout
from embferry.protocol.ranges import RangeSet
from embferry.transfer.fields import Array

VERSION = 1
MAGIC = b"embferry"
HEAD_BYTES = 256
PAGE = 1 << 16
"""The rows begin on a multiple of it, which is one of the page size of every processor, so that they can be mapped."""
KEY_CHARACTERS = 32
_HEAD = struct.Struct("<8sIQ32sB64s")
_CHUNK = struct.Struct("<QQ8s")
_CHECK = struct.Struct("<Q")
RECORD_BYTES = _CHUNK.size + _CHECK.size


@dataclass(frozen=True)
class Head:
    """The embedding that a file is for.

    Attributes:
        layout: The fields of a token.
        content_digest: The digest that the sender has announced, 1 to 64 bytes.
        total_tokens: The length, at least 1.
    """

    layout: Layout
    content_digest: bytes
    total_tokens: int

    @cached_property
    def encoded(self) -> bytes:
        """The head as it stands in the file."""
        digest = self.content_digest
        layout = hashlib.blake2b(msgspec.msgpack.encode(self.layout), digest_size=32).digest()
        return _HEAD.pack(MAGIC, VERSION, self.total_tokens, layout, len(digest), digest).ljust(HEAD_BYTES, b"\0")

    @cached_property
    def key(self) -> str:
        """Names the embedding; hexadecimal."""
        return hashlib.blake2b(self.encoded, digest_size=KEY_CHARACTERS // 2).hexdigest()

    @property
    def records_bytes(self) -> int:
        """Room for as many records as there are tokens: a chunk has one at least."""
        return self.total_tokens * RECORD_BYTES

    @property
    def rows_at(self) -> int:
        """Where the rows begin."""
        return -(-(HEAD_BYTES + self.records_bytes) // PAGE) * PAGE

    @cached_property
    def fields_at(self) -> tuple[int, ...]:
        """Where each field begins, counted from :attr:`rows_at`, and at last where the rows end."""
        at, found = 0, [0]
        for field in self.layout.fields:
            at += -(-field.token_bytes * self.total_tokens // ALIGNMENT) * ALIGNMENT
            found.append(at)
        return tuple(found)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.rows_at + self.fields_at[-1]

    def arrays(self, rows: Array) -> dict[str, Array]:
        """Returns each field of the rows, uint8 [total_tokens, bytes a token]: views."""
        fields = zip(self.layout.fields, self.fields_at, strict=False)
        size = self.total_tokens
        return {f.name: rows[at : at + f.token_bytes * size].reshape(size, f.token_bytes) for f, at in fields}


@dataclass(frozen=True, slots=True)
class Record:
    """A chunk that has arrived: tokens ``[offset, offset + length)``, and their checksum as their sender took it."""

    offset: int
    length: int
    checksum: bytes

    @property
    def stop(self) -> int:
        return self.offset + self.length

    def encoded(self, index: int) -> bytes:
        """Returns the record as it stands in the file as the ``index``-th one."""
        chunk = _CHUNK.pack(self.offset, self.length, self.checksum)
        return chunk + _CHECK.pack(xxhash.xxh3_64_intdigest(chunk, seed=index))

    def matches(self, layout: Layout, arrays: Mapping[str, Array]) -> bool:
        """Returns whether the rows are those that arrived."""
        rows = (arrays[field.name][self.offset : self.stop].data.cast("B") for field in layout.fields)
        return checksum(rows).to_bytes(8) == self.checksum


def record_at(index: int) -> int:
    """Returns where the ``index``-th record begins."""
    return HEAD_BYTES + index * RECORD_BYTES


def read_records(data: bytes, total_tokens: int) -> Iterator[Record]:
    """Yields the records in ``data``, up to the first that is not whole or cannot be.

    Args:
        data: The bytes behind the head.
        total_tokens: The length of the embedding.
    """
    seen = RangeSet()
    for index in range(min(len(data) // RECORD_BYTES, total_tokens)):
        raw = data[index * RECORD_BYTES : (index + 1) * RECORD_BYTES]
        record = Record(*_CHUNK.unpack_from(raw))
        if record.encoded(index) != raw or not 0 < record.length <= total_tokens - record.offset:
            return
        if seen.overlaps(record.offset, record.stop):
            return
        seen.add(record.offset, record.stop)
        yield record
