"""Where the bytes of tokens lie in the origin's buffers, and the one field whose bytes have another order there.

A row of ``mrope_positions`` with n tokens is [3, n] in the origin: first the n temporal positions, then the heights,
then the widths. Here an embedding is [tokens, 3] like any other field, so it is turned on the way out and in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from embferry.memory.buffers import AUX_WIDTH, MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.transports.leased.jobs import Run

from .settings import MROPE

Bytes = npt.NDArray[np.uint8]
Rows = Mapping[str, Bytes]
"""Field name to its bytes, uint8 [tokens, bytes a token], contiguous."""

AUX_POINTER = 3
AUX_BYTES = AUX_WIDTH * 4
PLANES = 3


def pointer_of(field: int) -> int:
    """Which base pointer is a layout field's: ``aux_datas`` stands before the last."""
    return field if field < AUX_POINTER else field + 1


def check_rows(geometry: Geometry, rows: Rows, room: int) -> int:
    """How many tokens ``rows`` hold.

    :raises LocalProtocolError: a field is missing, or its shape, dtype or order in memory is another one.
    """
    total = len(rows.get("input_embeddings", ()))
    for field in geometry.layout.fields:
        array = rows.get(field.name)
        if array is None or array.dtype != np.uint8 or array.shape != (total, field.token_bytes):
            have = "missing" if array is None else f"{array.dtype} {array.shape}"
            need = f"uint8 ({total}, {field.token_bytes})"
            raise LocalProtocolError(f"field {field.name} is {have}, it has to be {need}", room=room)
        if not array.flags.c_contiguous:
            raise LocalProtocolError(f"field {field.name} is not contiguous", room=room)
    return total


def to_planes(tokens: Bytes, block_size: int) -> Bytes:
    """[n, 3] int32 as bytes, from a block's start on, to what the rows of its blocks hold one after another."""
    out = np.empty_like(tokens)
    full = len(tokens) // block_size * block_size
    for part, size in ((slice(0, full), block_size), (slice(full, len(tokens)), len(tokens) - full)):
        if size and len(out[part]):
            blocks = tokens[part].view(np.int32).reshape(-1, size, PLANES)
            out[part].view(np.int32).reshape(-1, PLANES, size)[:] = blocks.transpose(0, 2, 1)
    return out


def from_planes(rows: Bytes, block_size: int) -> Bytes:
    """The reverse of :func:`to_planes`."""
    out = np.empty_like(rows)
    full = len(rows) // block_size * block_size
    for part, size in ((slice(0, full), block_size), (slice(full, len(rows)), len(rows) - full)):
        if size and len(out[part]):
            blocks = rows[part].view(np.int32).reshape(-1, PLANES, size)
            out[part].view(np.int32).reshape(-1, size, PLANES)[:] = blocks.transpose(0, 2, 1)
    return out


def writes(
    geometry: Geometry,
    rows: Rows,
    pointers: Sequence[int],
    blocks: tuple[int, ...],
    sent_tokens: int,
    num_tokens: int,
    aux: npt.NDArray[np.int32] | None,
    *,
    planes: bool,
) -> tuple[list[Run], object]:
    """Tokens ``[sent_tokens, sent_tokens + num_tokens)`` into ``blocks``, from the first one's start.

    :param aux: int32 [16], for the first block.
    :returns: (from address, to address, bytes) of each write, and what keeps the sources alive.
    """
    sources: list[npt.NDArray[np.generic]] = []
    for field in geometry.layout.fields:
        part = rows[field.name][sent_tokens : sent_tokens + num_tokens]
        sources.append(to_planes(part, geometry.block_size) if planes and field.name == MROPE else part)
    found = []
    fields = geometry.layout.fields
    for index, token, offset, length in geometry.spans(blocks, 0, num_tokens):
        source = sources[index].ctypes.data + token * fields[index].token_bytes
        target = pointers[pointer_of(index)] + offset - geometry.field_offsets[index]
        found.append((source, target, length))
    if aux is not None:
        sources.append(aux)
        found.append((aux.ctypes.data, pointers[AUX_POINTER] + blocks[0] * AUX_BYTES, AUX_BYTES))
    return found, sources


def gather(
    buffers: MultimodalDataBuffers, blocks: tuple[int, ...], tokens: int, out: Rows, at: int, *, planes: bool
) -> None:
    """Copies ``tokens`` tokens from ``blocks`` to ``out[field name]`` from token ``at`` on."""
    buffers.gather_into(blocks, 0, tokens, out, at)
    if planes:
        arrived = out[MROPE][at : at + tokens]
        arrived[:] = from_planes(arrived, buffers.geometry.block_size)
