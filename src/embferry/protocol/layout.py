"""The fields of a token, and where their bytes lie in a region of blocks.

A token has several fields, a block holds ``block_size`` tokens of each. A region lays the fields one after
another; inside a field, block ``b`` is row ``b``, so adjacent blocks are adjacent bytes. Both peers compute the
same :class:`Geometry` from the receiver's ``open`` message, so no pointer ever crosses the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from .errors import LayoutMismatch

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "uint8": 1}
"""Bytes of one element, by dtype name."""

ALIGNMENT = 64  # bytes: each field starts on a cache line
MAX_FIELDS = 16
MAX_WIDTH = 1 << 20
MAX_NAME = 64
MAX_DTYPE = 32  # characters: longer than every dtype, also of later versions
MAX_BLOCKS = 1 << 32
MAX_BLOCK_SIZE = 1 << 20
MAX_TOKEN_BYTES = 1 << 24
MAX_REGION_BYTES = 1 << 48


class Field(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One field of a token: ``width`` elements of ``dtype``."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
    dtype: Annotated[str, Meta(max_length=MAX_DTYPE)]
    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]

    @property
    def token_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.width

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{self.width}]"


class Layout(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The fields of a token, in the order in which they are laid out and checksummed."""

    fields: Annotated[tuple[Field, ...], Meta(min_length=1, max_length=MAX_FIELDS)]

    @property
    def token_bytes(self) -> int:
        return sum(f.token_bytes for f in self.fields)

    def validate(self) -> None:
        """Checks a layout that may have come from the wire, where decoding has bounded each number alone.

        Raises:
            LayoutMismatch: It is out of bounds.
        """
        if not 1 <= len(self.fields) <= MAX_FIELDS:
            raise LayoutMismatch(f"a layout has 1 to {MAX_FIELDS} fields, not {len(self.fields)}")
        names = [f.name for f in self.fields]
        if len(set(names)) != len(names) or not all(1 <= len(name) <= MAX_NAME for name in names):
            raise LayoutMismatch(
                f"the fields of a layout have distinct names of 1 to {MAX_NAME} characters, not {names}"
            )
        for field in self.fields:
            if field.dtype not in ITEM_BYTES or not 1 <= field.width <= MAX_WIDTH:
                raise LayoutMismatch(f"field {field} has an unknown dtype or an impossible width")
        if self.token_bytes > MAX_TOKEN_BYTES:
            raise LayoutMismatch(f"a token of {self.token_bytes} bytes; the limit is {MAX_TOKEN_BYTES}")

    def difference(self, other: Layout) -> str | None:
        """Returns how ``other`` differs, in words, or None if they are equal."""
        if self == other:
            return None
        ours, theirs = ({f.name: f for f in x.fields} for x in (self, other))
        parts = [f"{ours[n]} here, {theirs[n]} there" for n in ours if n in theirs and ours[n] != theirs[n]]
        parts += [f"{n} only here" for n in ours if n not in theirs]
        parts += [f"{n} only there" for n in theirs if n not in ours]
        return "; ".join(parts) or "the same fields in another order"


class Geometry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A region of ``num_blocks`` blocks of ``block_size`` tokens each."""

    layout: Layout
    num_blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    block_size: Annotated[int, Meta(ge=1, le=MAX_BLOCK_SIZE)]

    def validate(self) -> None:
        """Checks a geometry that may have come from the wire.

        Raises:
            LayoutMismatch: It is out of bounds.
        """
        self.layout.validate()
        if not (1 <= self.num_blocks <= MAX_BLOCKS and 1 <= self.block_size <= MAX_BLOCK_SIZE):
            raise LayoutMismatch(f"{self.num_blocks} blocks of {self.block_size} tokens are out of bounds")
        if self.region_bytes > MAX_REGION_BYTES:
            raise LayoutMismatch(f"a region of {self.region_bytes} bytes; the limit is {MAX_REGION_BYTES}")

    @property
    def field_offsets(self) -> tuple[int, ...]:
        """The start of each field, in bytes from the start of the region."""
        offsets, at = [], 0
        for field in self.layout.fields:
            offsets.append(at)
            size = field.token_bytes * self.block_size * self.num_blocks
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return tuple(offsets)

    @property
    def region_bytes(self) -> int:
        last = self.layout.fields[-1]
        return self.field_offsets[-1] + last.token_bytes * self.block_size * self.num_blocks

    def spans(self, blocks: tuple[int, ...], skip: int, tokens: int) -> Iterator[tuple[int, int, int, int]]:
        """Locates ``tokens`` tokens that begin ``skip`` tokens into ``blocks``.

        Yields:
            ``(field index, token, offset, length)``: from the chunk's ``token``-th token on, ``length`` bytes of that
            field lie at ``offset`` bytes from the start of the region. Field by field, tokens ascending; adjacent
            blocks make one span.

        Raises:
            ValueError: The blocks do not hold so many tokens.
        """
        if skip < 0 or tokens < 0 or skip + tokens > len(blocks) * self.block_size:
            raise ValueError(f"tokens [{skip}, {skip + tokens}) are outside of {len(blocks)} blocks")
        runs = list(merged(blocks))
        for index, (field, base) in enumerate(zip(self.layout.fields, self.field_offsets, strict=True)):
            size, before = field.token_bytes, 0  # before: tokens of the blocks passed so far
            for first, count in runs:
                begin = max(skip, before)
                end = min(skip + tokens, before + count * self.block_size)
                if begin < end:
                    at = base + (first * self.block_size + begin - before) * size
                    yield index, begin - skip, at, (end - begin) * size
                before += count * self.block_size


def merged(blocks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields ``(first, count)`` for each run of ascending adjacent block indices, in the order given."""
    first = count = 0
    for block in blocks:
        if count and block == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = block, 1
    if count:
        yield first, count
