"""The region of blocks: its fields, chunks, gathering, use in place, and the end of its memory."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.memory.buffers import AUX_WIDTH, MultimodalDataBuffers, checksum, source_pieces
from embferry.protocol.errors import LayoutMismatch, LocalProtocolError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.testing.pair import embedding

EMBEDDINGS, IDS, POSITIONS = (
    Field("input_embeddings", "bfloat16", 6),
    Field("fill_ids", "int32", 1),
    Field("mrope_positions", "int32", 3),
)
DEEPSTACK = Field("deepstack_embeddings", "bfloat16", 10)
LAYOUT = Layout((EMBEDDINGS, IDS, POSITIONS, DEEPSTACK))
GEOMETRY = Geometry(LAYOUT, num_blocks=7, block_size=3)


def land(
    buffers: MultimodalDataBuffers,
    fields: dict[str, np.ndarray],
    offset: int,
    tokens: int,
    blocks: tuple[int, ...],
    skip: int,
) -> None:
    """Copies tokens of ``fields`` into the region as a transport does."""
    view = buffers.view
    for piece in source_pieces(buffers.geometry, fields, offset, tokens, blocks, skip):
        view[piece.offset : piece.offset + piece.source.nbytes] = piece.source


@pytest.mark.parametrize("shared", [True, False])
def test_fields_are_views_of_one_region(shared: bool) -> None:
    buffers = MultimodalDataBuffers(GEOMETRY, shared=shared)
    assert buffers.input_embeddings.shape == (7, 3 * 12)
    assert buffers.fill_ids.shape == (7, 3 * 4)
    assert buffers.mrope_positions.shape == (7, 3 * 12)
    assert buffers.deepstack_embeddings is not None
    assert buffers.deepstack_embeddings.shape == (7, 3 * 20)
    assert buffers.aux_datas.shape == (7, AUX_WIDTH)
    assert buffers.aux_datas.dtype == np.int32
    buffers.write_aux(3, 1 << 31, (5, -7))
    assert buffers.aux_datas[3].tolist() == [(1 << 31) - 1, -7] + [0] * (AUX_WIDTH - 2)
    buffers.write_aux(3, 12, ())
    assert buffers.aux_datas[3].tolist() == [12] + [0] * (AUX_WIDTH - 1), "nothing of the embedding before is left"
    assert buffers.view.nbytes == GEOMETRY.region_bytes
    assert not any(buffers.view)
    buffers.fill_ids[4] = 9
    at = GEOMETRY.field_offsets[1] + 4 * 12
    assert bytes(buffers.view[at - 1 : at + 13]) == b"\x00" + b"\x09" * 12 + b"\x00"
    assert buffers.rows == tuple(zip(GEOMETRY.field_offsets, (36, 12, 36, 60), strict=True))
    buffers.close()


def test_fields_missing_in_the_layout_are_not_available() -> None:
    buffers = MultimodalDataBuffers(Geometry(Layout((EMBEDDINGS,)), 2, 2), shared=False)
    assert buffers.deepstack_embeddings is None
    with pytest.raises(LocalProtocolError, match="fill_ids"):
        _ = buffers.fill_ids
    buffers.close()


def test_an_invalid_geometry_is_rejected() -> None:
    with pytest.raises(LayoutMismatch):
        MultimodalDataBuffers(Geometry(LAYOUT, 0, 3), shared=False)


def test_a_shared_region_cannot_be_truncated() -> None:
    buffers = MultimodalDataBuffers(GEOMETRY, shared=True)
    assert buffers.fd is not None
    peer = os.open(f"/proc/self/fd/{buffers.fd}", os.O_RDWR)
    try:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(peer, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(peer, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with mmap.mmap(peer, GEOMETRY.region_bytes) as mapped:
            mapped[:4] = b"seen"
        assert bytes(buffers.view[:4]) == b"seen"
    finally:
        os.close(peer)
        buffers.close()


@given(data=st.data())
def test_gathered_chunks_equal_the_source_and_have_its_checksum(data: st.DataObject) -> None:
    """Transfers an embedding in chunks of any offset and length through scattered blocks."""
    total = data.draw(st.integers(1, 40))
    fields = embedding(LAYOUT, total, seed=total)
    buffers = MultimodalDataBuffers(GEOMETRY, shared=False)
    out = {name: np.zeros_like(array) for name, array in fields.items()}
    done = 0
    while done < total:
        count = data.draw(st.integers(1, 7))
        blocks = tuple(data.draw(st.permutations(range(7))))[:count]
        skip = data.draw(st.integers(0, count * 3 - 1))
        tokens = min(data.draw(st.integers(1, count * 3 - skip)), total - done)
        buffers.view[:] = bytes(buffers.view.nbytes)
        land(buffers, fields, done, tokens, blocks, skip)
        arrived = buffers.chunk(blocks, skip, tokens)
        assert [index for index, _ in arrived] == sorted(index for index, _ in arrived)
        pieces = source_pieces(GEOMETRY, fields, done, tokens, blocks, skip)
        whole = b"".join(fields[f.name][done : done + tokens].tobytes() for f in LAYOUT.fields)
        assert b"".join(view for _, view in arrived) == whole
        assert checksum(v for _, v in arrived) == checksum(p.source for p in pieces) == checksum([memoryview(whole)])
        buffers.gather_into(blocks, skip, tokens, out, done)
        done += tokens
    assert all(np.array_equal(out[name], fields[name]) for name in fields)
    del arrived
    buffers.close()


def test_a_flipped_bit_changes_the_checksum() -> None:
    fields = embedding(LAYOUT, 5)
    pieces = source_pieces(GEOMETRY, fields, 0, 5, (3, 1), 1)
    before = checksum(p.source for p in pieces)
    fields["mrope_positions"][4, 11] ^= 1
    assert checksum(p.source for p in pieces) != before


def test_pieces_are_views_of_the_source() -> None:
    fields = embedding(LAYOUT, 9)
    pieces = source_pieces(GEOMETRY, fields, 2, 6, (4, 5, 0), 1)
    for piece in pieces:
        assert any(np.shares_memory(np.frombuffer(piece.source, np.uint8), array) for array in fields.values())
    assert sum(p.source.nbytes for p in pieces) == 6 * LAYOUT.token_bytes
    assert len(pieces) == 2 * len(LAYOUT.fields), "adjacent blocks make one piece"


def test_adjacent_blocks_are_used_in_place() -> None:
    buffers = MultimodalDataBuffers(GEOMETRY, shared=False)
    fields = embedding(LAYOUT, 8)
    land(buffers, fields, 0, 8, (2, 3, 4), 0)
    found = buffers.in_place((2, 3, 4), 8)
    assert found is not None
    assert set(found) == set(fields)
    for name, array in fields.items():
        assert np.array_equal(found[name], array)
        assert np.shares_memory(found[name], buffers.field(name))
    assert buffers.in_place((2, 4, 3), 8) is None
    assert buffers.in_place((4, 3), 3) is None
    del found
    buffers.close()


def test_fields_of_another_shape_or_type_are_rejected() -> None:
    fields = embedding(LAYOUT, 6)
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({k: v for k, v in fields.items() if k != "fill_ids"}, "fill_ids"),
        (fields | {"fill_ids": fields["fill_ids"].astype(np.int32)}, "int32"),
        (fields | {"fill_ids": fields["fill_ids"][:, :2]}, "uint8"),
        (fields | {"fill_ids": fields["fill_ids"][:5]}, "outside"),
        (fields | {"mrope_positions": np.asfortranarray(fields["mrope_positions"])}, "contiguous"),
    ]
    for case, match in wrong:
        with pytest.raises(LocalProtocolError, match=match):
            source_pieces(GEOMETRY, case, 0, 6, (0, 1), 0)
    with pytest.raises(LocalProtocolError, match="outside"):
        source_pieces(GEOMETRY, fields, -1, 3, (0, 1), 0)
    with pytest.raises(ValueError, match="outside"):
        source_pieces(GEOMETRY, fields, 0, 6, (0,), 0)
    buffers = MultimodalDataBuffers(GEOMETRY, shared=False)
    with pytest.raises(LocalProtocolError, match="outside"):
        buffers.gather_into((0, 1), 0, 6, {"fill_ids": np.zeros((6, 4), np.uint8)}, 1)
    buffers.close()


def test_some_fields_can_be_gathered_alone() -> None:
    buffers = MultimodalDataBuffers(GEOMETRY, shared=False)
    fields = embedding(LAYOUT, 6)
    land(buffers, fields, 0, 6, (6, 2), 0)
    out = np.zeros((8, 4), np.uint8)
    buffers.gather_into((6, 2), 0, 6, {"fill_ids": out}, 2)
    assert np.array_equal(out[2:], fields["fill_ids"])
    assert not out[:2].any()
    buffers.close()


@pytest.mark.parametrize("shared", [True, False])
def test_views_outlive_close_and_the_last_one_frees_the_memory(shared: bool) -> None:
    def mappings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("embferry-region")

    before = mappings()  # first: it collects garbage of other tests, which may hold descriptors
    descriptors = len(os.listdir("/proc/self/fd"))
    buffers = MultimodalDataBuffers(GEOMETRY, shared=shared)
    buffers.fill_ids[:] = 5
    kept, chunk = buffers.fill_ids, buffers.chunk((1,), 0, 3)
    buffers.close()
    buffers.close()
    assert kept.min() == 5
    assert chunk[1][1][0] == 5
    assert mappings() == before + shared
    with pytest.raises(LocalProtocolError, match="closed"):
        _ = buffers.view
    del kept, chunk
    assert mappings() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_origin_s_module_exports_the_same_classes() -> None:
    from embferry.disaggregation import utils
    from embferry.memory import blocks, buffers

    assert utils.MultimodalDataBuffers is buffers.MultimodalDataBuffers
    assert utils.MetadataAllocation is blocks.MetadataAllocation
    assert utils.ReqToMetadataBlockAllocator is blocks.ReqToMetadataBlockAllocator
