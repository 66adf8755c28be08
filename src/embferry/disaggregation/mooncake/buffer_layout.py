"""Where the bytes of tokens lie in the origin's buffers, and the one field whose bytes have another order there.

A row of ``mrope_positions`` with n tokens is [3, n] in the origin: the n temporal positions, then the heights, then the
widths. Embeddings here are [tokens, 3] for every field, so this one is transposed when it is sent and when it arrives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embferry.memory.buffers import AUX_WIDTH, MultimodalDataBuffers
from embferry.protocol.layout import Geometry
from embferry.transfer.fields import Array, Fields
from embferry.transports.leased.jobs import Run

from ..wire.sender_rooms import WriteBlocks
from .settings import MROPE

AUX_POINTER = 3
"""Index of ``aux_datas`` among the base pointers."""
AUX_BYTES = AUX_WIDTH * 4
PLANES = 3


def transposed(array: Array, block_size: int, *, to_planes: bool) -> Array:
    """Transposes positions from 3 a token to 3 planes a row of their blocks, which begin at the first token, or back.

    Args:
        array: Bytes of int32 positions, uint8 [n, 12].
        block_size: Tokens of a row.
        to_planes: The direction.
    """
    out = np.empty_like(array)
    full = len(array) // block_size * block_size
    for part, size in ((slice(0, full), block_size), (slice(full, len(array)), len(array) - full)):
        if len(array[part]):
            before, after = ((size, PLANES), (PLANES, size)) if to_planes else ((PLANES, size), (size, PLANES))
            blocks = array[part].view(np.int32).reshape(-1, *before)
            out[part].view(np.int32).reshape(-1, *after)[:] = blocks.transpose(0, 2, 1)
    return out


def block_writes(
    geometry: Geometry, command: WriteBlocks, fields: Fields, aux: npt.NDArray[np.int32], *, planes: bool
) -> tuple[list[Run], object]:
    """Computes the runs of a command, and an object that keeps their source memory alive.

    Args:
        geometry: The peer's pool.
        command: The tokens, and the blocks that they fill from their start on.
        fields: The whole embedding.
        aux: ``aux_datas`` of the first block, int32 [16].
        planes: Whether ``mrope_positions`` are transposed.
    """
    sources: list[npt.NDArray[np.generic]] = []
    for field in geometry.layout.fields:
        part = fields[field.name][command.sent_tokens : command.sent_tokens + command.num_tokens]
        if planes and field.name == MROPE:
            part = transposed(part, geometry.block_size, to_planes=True)
        sources.append(part)
    runs = []
    for index, token, offset, length in geometry.spans(command.blocks, 0, command.num_tokens):
        source = sources[index].ctypes.data + token * geometry.layout.fields[index].token_bytes
        pointer = command.pointers[index if index < AUX_POINTER else index + 1]  # aux_datas stands before the fourth
        runs.append((source, pointer + offset - geometry.field_offsets[index], length))
    if command.aux:
        sources.append(aux)
        runs.append((aux.ctypes.data, command.pointers[AUX_POINTER] + command.blocks[0] * AUX_BYTES, AUX_BYTES))
    return runs, sources


def gather(
    buffers: MultimodalDataBuffers, blocks: tuple[int, ...], tokens: int, out: Fields, at: int, *, planes: bool
) -> None:
    """Copies ``tokens`` tokens, which fill ``blocks``, to the arrays of ``out`` from token ``at`` on.

    The arrays are uint8 [total tokens, bytes a token]. ``planes``: whether ``mrope_positions`` are transposed.
    """
    buffers.gather_into(blocks, 0, tokens, out, at)
    if planes:
        arrived = out[MROPE][at : at + tokens]
        arrived[:] = transposed(arrived, buffers.geometry.block_size, to_planes=False)
