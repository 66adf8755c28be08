"""The memory of the receive pool: one region, the fields of a token one after another, blocks as rows.

Arrived tokens are used in one of three ways: handed on chunk by chunk (``chunk``), gathered once into a tensor of the
final length (``gather_into``), or used in place if their blocks are adjacent (``in_place``). The sending side needs no
region: :func:`source_pieces` points into the tensor itself.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import xxhash

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Geometry, merged

from .memfd import sealed_memfd
from .piece import Piece

__all__ = ["AUX_WIDTH", "MultimodalDataBuffers", "checksum", "source_pieces"]

MAX_INT32 = (1 << 31) - 1
AUX_WIDTH = 16
"""Number of int32 values for each block in ``aux_datas``: [0] total tokens of the embedding, [1] its mrope position
delta. A total above 2³¹−1 does not fit: [0] is then 2³¹−1, and the receiver's ``total_tokens`` has the number."""

PASS_BYTES = 1 << 20
"""Bytes that are checksummed, then copied, at a time: they fit the cache."""

Bytes = npt.NDArray[np.uint8]


def aux_row(total_tokens: int, aux: Sequence[int]) -> npt.NDArray[np.int32]:
    """Returns a row of ``aux_datas``, int32 [AUX_WIDTH]: what the sender announced, with the length in [0]."""
    row = np.zeros(AUX_WIDTH, np.int32)
    row[: len(aux)] = aux
    row[0] = min(total_tokens, MAX_INT32)
    return row


class MultimodalDataBuffers:
    """A region of blocks, to be registered with transports (their contract calls it ``Region``).

    Arrays and memory views of it stay valid after :meth:`close`: the memory is freed with the last of them.

    Args:
        geometry: Fields, number of blocks and block size.
        shared: Use a sealed memfd, which transports that map the region need and which vanishes even after SIGKILL.
            Otherwise private memory.

    Attributes:
        aux_datas: int32 [num_blocks, AUX_WIDTH]. Not part of the region: the receiver fills it from the offer.

    Raises:
        LayoutMismatch: The geometry is out of bounds.
        OSError: The memory cannot be mapped.
    """

    def __init__(self, geometry: Geometry, *, shared: bool) -> None:
        geometry.validate()
        self.geometry = geometry
        size = geometry.region_bytes
        self._fd = sealed_memfd("embferry-region", size) if shared else None
        if self._fd is None:
            self._map: mmap.mmap | None = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map.madvise(mmap.MADV_HUGEPAGE)  # copies between processes take nearly half the time
        else:
            self._map = mmap.mmap(self._fd, size)
        self.aux_datas: npt.NDArray[np.int32] = np.zeros((geometry.num_blocks, AUX_WIDTH), np.int32)

    # Region

    @property
    def view(self) -> memoryview:
        return memoryview(self._mapped())

    @property
    def fd(self) -> int | None:
        return self._fd

    @property
    def num_blocks(self) -> int:
        return self.geometry.num_blocks

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        size = self.geometry.block_size
        fields = zip(self.geometry.layout.fields, self.geometry.field_offsets, strict=True)
        return tuple((offset, field.token_bytes * size) for field, offset in fields)

    def write_aux(self, block: int, total_tokens: int, aux: Sequence[int]) -> None:
        """Writes what the sender announced into ``aux_datas`` of the block that holds token 0."""
        self.aux_datas[block] = aux_row(total_tokens, aux)

    # Fields

    def field(self, name: str) -> Bytes:
        """Returns a view of a field, uint8 ``[num_blocks, block_size * token_bytes]``.

        Raises:
            LocalProtocolError: The layout has no such field.
        """
        for field, (offset, row) in zip(self.geometry.layout.fields, self.rows, strict=True):
            if field.name == name:
                return self._bytes()[offset : offset + row * self.num_blocks].reshape(self.num_blocks, row)
        raise LocalProtocolError(
            f"the layout has no field {name}; it has {[f.name for f in self.geometry.layout.fields]}"
        )

    @property
    def input_embeddings(self) -> Bytes:
        return self.field("input_embeddings")

    @property
    def fill_ids(self) -> Bytes:
        return self.field("fill_ids")

    @property
    def mrope_positions(self) -> Bytes:
        return self.field("mrope_positions")

    @property
    def deepstack_embeddings(self) -> Bytes | None:
        """None if the layout has no such field: only some models inject vision features into deeper layers."""
        names = [field.name for field in self.geometry.layout.fields]
        return self.field("deepstack_embeddings") if "deepstack_embeddings" in names else None

    def bytes(self, offset: int, length: int) -> Bytes:
        """Returns a view of ``length`` bytes from ``offset`` of the region on, uint8."""
        return self._bytes()[offset : offset + length]

    # Arrived tokens. In the methods below, tokens are counted from ``skip`` tokens into ``blocks``.

    def chunk(self, blocks: Sequence[int], skip: int, tokens: int) -> list[tuple[int, memoryview]]:
        """Returns ``(field index, bytes)`` of ``tokens`` tokens in checksum order: field by field, tokens ascending."""
        view = self.view
        spans = self.geometry.spans(tuple(blocks), skip, tokens)
        return [(index, view[offset : offset + length]) for index, _, offset, length in spans]

    def gather_into(
        self,
        blocks: Sequence[int],
        skip: int,
        tokens: int,
        out: Mapping[str, Bytes],
        at: int,
        *,
        digest: bool = False,
    ) -> int | None:
        """Copies tokens out of the region.

        Args:
            blocks: The blocks that hold the tokens.
            skip: Tokens to skip at the start of the first block.
            tokens: Number of tokens.
            out: Field name to uint8 ``[total, token_bytes]``. Fields that it lacks are not copied.
            at: The token of ``out`` to copy to.
            digest: Take :func:`checksum` of the bytes in the same pass. Every field must then be copied.

        Returns:
            The checksum, or None without ``digest``.

        Raises:
            LocalProtocolError: An array does not fit.
        """
        passes = self.gathering(blocks, skip, tokens, out, at, digest=digest)
        while True:
            try:
                next(passes)
            except StopIteration as end:
                return cast("int | None", end.value)

    def gathering(
        self, blocks: Sequence[int], skip: int, tokens: int, out: Mapping[str, Bytes], at: int, *, digest: bool
    ) -> Generator[None, None, int | None]:
        """Like :meth:`gather_into`, as a generator that yields after every :data:`PASS_BYTES` at most."""
        region, fields = self._bytes(), self.geometry.layout.fields
        for field in fields:
            if field.name in out:
                _check_field(out[field.name], field.name, field.token_bytes, at, tokens)
        hashed = xxhash.xxh3_64() if digest else None
        for index, token, offset, length in self.geometry.spans(tuple(blocks), skip, tokens):
            field = fields[index]
            if field.name not in out:
                continue
            flat = out[field.name].reshape(-1)
            start = (at + token) * field.token_bytes
            for step in range(0, length, PASS_BYTES):
                count = min(PASS_BYTES, length - step)
                part = region[offset + step : offset + step + count]
                if hashed is not None:
                    hashed.update(part.data)  # the copy that follows reads from the cache
                flat[start + step : start + step + count] = part
                yield
        return None if hashed is None else int(hashed.intdigest())

    def in_place(self, blocks: Sequence[int], tokens: int) -> dict[str, Bytes] | None:
        """Returns views of the first ``tokens`` tokens of ``blocks``, uint8 ``[tokens, token_bytes]`` for each field.

        None if the blocks are not adjacent. Valid until the blocks are granted to another writer.
        """
        if len(list(merged(tuple(blocks)))) != 1:
            return None
        region, fields = self._bytes(), self.geometry.layout.fields
        return {
            fields[index].name: region[offset : offset + length].reshape(tokens, -1)
            for index, _, offset, length in self.geometry.spans(tuple(blocks), 0, tokens)
        }

    def close(self) -> None:
        """Frees the memory. Idempotent. Close the transports that it is registered with first."""
        mapped, self._map = self._map, None
        if mapped is None:
            return
        try:
            mapped.close()
        except BufferError:
            # A view still exists. It owns the mapping now, which is unmapped with it.
            del mapped
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise LocalProtocolError("the buffers are closed; keep them open as long as a transfer uses them")
        return self._map

    def _bytes(self) -> Bytes:
        return np.frombuffer(self._mapped(), np.uint8)


def checksum(views: Iterable[memoryview]) -> int:
    """Returns the xxh3_64 of the bytes of ``views``, one after another.

    Sender and receiver both pass a chunk's bytes field by field, tokens ascending, so the digest does not depend on how
    the blocks are scattered: ``checksum(piece.source for piece in source_pieces(...))`` on one side equals
    ``checksum(view for _, view in buffers.chunk(...))`` on the other.
    """
    digest = xxhash.xxh3_64()
    for view in views:
        digest.update(view)
    return int(digest.intdigest())


def source_pieces(
    geometry: Geometry, fields: Mapping[str, Bytes], offset: int, tokens: int, blocks: Sequence[int], skip: int
) -> list[Piece]:
    """Returns the pieces that write tokens ``[offset, offset + tokens)`` to ``skip`` tokens into ``blocks``.

    The pieces point into the arrays: nothing is copied.

    Args:
        geometry: Of the receiver's region.
        fields: uint8 ``[total, token_bytes]``, C-contiguous, for each field of the layout.
        offset: First token of the embedding to write.
        tokens: Number of tokens.
        blocks: Blocks of the receiver that the tokens fill.
        skip: Tokens to skip at the start of the first block.

    Raises:
        LocalProtocolError: A field is missing, or its shape or length does not fit.
    """
    flat: list[tuple[memoryview, int]] = []
    for field in geometry.layout.fields:
        if field.name not in fields:
            raise LocalProtocolError(f"the embedding lacks the field {field}, which the receiver's layout has")
        array = fields[field.name]
        _check_field(array, field.name, field.token_bytes, offset, tokens)
        flat.append((array.data.cast("B") if array.size else memoryview(b""), field.token_bytes))
    pieces = []
    for index, token, at, length in geometry.spans(tuple(blocks), skip, tokens):
        source, token_bytes = flat[index]
        start = (offset + token) * token_bytes
        pieces.append(Piece(source[start : start + length], at))
    return pieces


def _check_field(array: Bytes, name: str, token_bytes: int, start: int, tokens: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != token_bytes:
        raise LocalProtocolError(
            f"field {name} is {array.dtype}{list(array.shape)}; pass its bytes, uint8 [tokens, {token_bytes}]"
        )
    if not array.flags.c_contiguous:
        raise LocalProtocolError(f"field {name} is not contiguous; make it contiguous once, not at each write")
    if start < 0 or tokens < 0 or start + tokens > len(array):
        raise LocalProtocolError(
            f"tokens [{start}, {start + tokens}) are outside of field {name}'s {len(array)} tokens"
        )
