"""The layout of the origin's buffers, the marks in them, and the settings, without sockets or engines."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation import wires
from embferry.disaggregation.mooncake.buffer_layout import block_writes, gather, transposed
from embferry.disaggregation.mooncake.conn_multimodal import OriginSettings, origin_layout
from embferry.disaggregation.mooncake.encode_ranks import rank_for
from embferry.disaggregation.mooncake.settings import check_geometry
from embferry.disaggregation.mooncake.write_marks import WriteMarks
from embferry.disaggregation.wire.receiver_room import Round
from embferry.disaggregation.wire.sender_rooms import WriteBlocks
from embferry.discovery.bootstrap_client import Shape
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.layout import Field, Geometry, Layout

from .builders import GEOMETRY, equal
from .origin_peers import BLOCK, TOKEN_BYTES, Buffers, embedding


@given(st.integers(0, 40), st.integers(1, 9))
def test_positions_are_the_same_after_transposing_them_twice(tokens: int, block_size: int) -> None:
    positions = np.arange(3 * tokens, dtype=np.int32).reshape(tokens, 3)
    rows = transposed(positions.view(np.uint8), block_size, to_planes=True)
    assert np.array_equal(transposed(rows, block_size, to_planes=False).view(np.int32), positions)
    for start in range(0, tokens, block_size):
        part = positions[start : start + block_size]
        assert np.array_equal(rows[start : start + block_size].reshape(-1).view(np.int32), part.T.reshape(-1))


@given(
    st.permutations(range(12)),
    st.integers(1, 12),
    st.integers(0, 11),
    st.integers(0, 12 * BLOCK),
    st.booleans(),
)
def test_tokens_are_written_where_the_origin_expects_them(
    order: list[int], count: int, first_block: int, tokens: int, planes: bool
) -> None:
    blocks, sent = tuple(order[:count]), first_block * BLOCK
    tokens = min(tokens, count * BLOCK)
    rows, theirs = embedding(sent + tokens), Buffers()
    aux = np.arange(16, dtype=np.int32)
    pointers = tuple(array.ctypes.data for array in theirs.all)
    command = WriteBlocks(1, "h:1", pointers, blocks, sent, tokens, sent == 0)
    runs, sources = block_writes(GEOMETRY, command, rows, aux, planes=planes)
    assert sum(length for *_, length in runs) == tokens * GEOMETRY.layout.token_bytes + 64 * (sent == 0)
    for source, target, length in runs:
        ctypes.memmove(target, source, length)
    del sources
    if planes:
        for i in range(-(-tokens // BLOCK)):
            part = slice(sent + i * BLOCK, min(sent + (i + 1) * BLOCK, sent + tokens))
            expected = {name: array[part] for name, array in rows.items()}
            assert equal(theirs.get(blocks[i], part.stop - part.start), expected)
    assert list(theirs.aux[blocks[0]]) == (list(range(16)) if sent == 0 else [0] * 16)
    unused = sorted(set(range(12)) - set(blocks[: -(-tokens // BLOCK)]))
    assert not any(theirs.rows[name][unused].any() for name in TOKEN_BYTES)


@given(st.permutations(range(12)), st.integers(1, 12 * BLOCK), st.integers(0, 2**32 - 1))
def test_marks_show_every_row_that_was_not_written(order: list[int], tokens: int, chosen: int) -> None:
    buffers = MultimodalDataBuffers(GEOMETRY, shared=False)
    blocks = tuple(order[: -(-tokens // BLOCK)])
    marks = WriteMarks(buffers, Round(blocks, 0, len(blocks) * BLOCK))
    assert marks.total_tokens() is None
    assert not marks.written(tokens)
    pointers = [buffers.field(name).ctypes.data for name in TOKEN_BYTES]
    pointers.insert(3, buffers.aux_datas.ctypes.data)
    rows, aux = embedding(tokens), np.full(16, tokens, np.int32)
    command = WriteBlocks(1, "h:1", tuple(pointers), blocks, 0, tokens, True)
    runs, sources = block_writes(GEOMETRY, command, rows, aux, planes=True)
    spared = chosen % len(runs)
    for i, (source, target, length) in enumerate(runs):
        if i != spared:
            ctypes.memmove(target, source, length)
    missing = runs[spared][2]
    if spared == len(runs) - 1:
        assert marks.total_tokens() is None
    elif missing >= 8:  # a shorter row has no mark
        assert not marks.written(tokens)
    source, target, length = runs[spared]
    ctypes.memmove(target, source, length)
    assert marks.written(tokens)
    assert marks.total_tokens() == tokens
    out = {name: np.empty_like(array) for name, array in rows.items()}
    gather(buffers, blocks, tokens, out, 0, planes=True)
    assert equal(out, rows)
    del sources
    buffers.close()


def test_each_language_rank_asks_one_encode_rank() -> None:
    def at(rank: int, tp: int, dp: int, shape: tuple[int, int], room: int = 5) -> tuple[int, int, int]:
        return rank_for(Shape(*shape), OriginSettings(tp_size=tp, dp_size=dp, engine_rank=rank), room)

    assert at(0, 1, 1, (1, 1)) == (0, 0, 1)
    assert [at(rank, 4, 1, (4, 1)) for rank in range(4)] == [(rank, 0, 1) for rank in range(4)]
    assert [at(rank, 4, 1, (2, 1))[::2] for rank in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [at(rank, 2, 1, (4, 1))[::2] for rank in range(2)] == [(0, 1), (2, 1)]
    assert at(3, 4, 2, (4, 2), room=5) == (1, 1, 1)
    with pytest.raises(RemoteProtocolError, match="divide"):
        at(0, 3, 1, (2, 1))


@pytest.mark.parametrize(
    "fields",
    [
        (Field("input_embeddings", "bfloat16", 8),),
        (Field("input_embeddings", "float32", 8), *origin_layout(8).fields[1:]),
        (*origin_layout(8).fields[:2], Field("mrope_positions", "int32", 4)),
        tuple(reversed(origin_layout(8).fields)),
        (*origin_layout(8, 8).fields, Field("more", "int32", 1)),
    ],
)
def test_fields_that_differ_from_the_origins_are_refused(fields: tuple[Field, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="origin_layout"):
        check_geometry(Geometry(Layout(fields), 4, 8))


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"engine_rank": 1}, {"tp_size": 3, "dp_size": 2}, {"heartbeat_interval": 0.0}, {"max_misses": 0}):
        with pytest.raises(LocalProtocolError):
            OriginSettings(**wrong)


def test_arguments_of_the_other_wire_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="settings does not go with wire='embferry'"):
        wires.receive_manager(GEOMETRY, (), settings=OriginSettings())  # type: ignore[call-overload]
    with pytest.raises(LocalProtocolError, match="transports does not go with wire='origin'"):
        wires.send_manager(GEOMETRY, [object()], wire="origin")  # type: ignore[call-overload]
