"""The places of tokens in a region, and the bounds of layouts and geometries."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.errors import LayoutMismatch
from embferry.protocol.layout import ALIGNMENT, ITEM_BYTES, MAX_FIELDS, Field, Geometry, Layout, merged

LAYOUTS = st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 40)), min_size=1, max_size=5).map(
    lambda fields: Layout(tuple(Field(f"f{i}", dtype, width) for i, (dtype, width) in enumerate(fields)))
)
GEOMETRIES = st.builds(Geometry, LAYOUTS, st.integers(1, 9), st.integers(1, 7))


def place(geometry: Geometry, field: int, block: int, slot: int) -> range:
    """Returns the bytes of a slot by the definition: block ``block`` is row ``block`` of its field."""
    size = geometry.layout.fields[field].token_bytes
    at = geometry.field_offsets[field] + (block * geometry.block_size + slot) * size
    return range(at, at + size)


@given(GEOMETRIES, st.data())
def test_spans_cover_exactly_the_bytes_of_the_tokens(geometry: Geometry, data: st.DataObject) -> None:
    indices = st.permutations(range(geometry.num_blocks))
    blocks = tuple(data.draw(indices)[: data.draw(st.integers(1, geometry.num_blocks))])
    room = len(blocks) * geometry.block_size
    skip = data.draw(st.integers(0, room))
    tokens = data.draw(st.integers(0, room - skip))
    covered: list[tuple[int, int, int]] = []  # (field, token, byte)
    for field, token, offset, length in geometry.spans(blocks, skip, tokens):
        size = geometry.layout.fields[field].token_bytes
        covered += [(field, token + at // size, offset + at) for at in range(length)]
    expected = [
        (field, token, byte)
        for field in range(len(geometry.layout.fields))
        for token in range(tokens)
        for byte in place(
            geometry, field, blocks[(skip + token) // geometry.block_size], (skip + token) % geometry.block_size
        )
    ]
    assert covered == expected  # field by field, tokens ascending: the order of the checksum
    assert len({byte for _, _, byte in covered}) == len(covered)
    assert all(0 <= byte < geometry.region_bytes for _, _, byte in covered)


@given(GEOMETRIES)
def test_fields_are_aligned_and_do_not_overlap(geometry: Geometry) -> None:
    sizes = [f.token_bytes * geometry.block_size * geometry.num_blocks for f in geometry.layout.fields]
    ends = [at + size for at, size in zip(geometry.field_offsets, sizes, strict=True)]
    assert all(at % ALIGNMENT == 0 for at in geometry.field_offsets)
    assert all(end <= at for end, at in zip(ends, geometry.field_offsets[1:], strict=False))
    assert geometry.region_bytes == ends[-1]
    assert geometry.layout.token_bytes == sum(f.token_bytes for f in geometry.layout.fields)
    geometry.validate()


@given(st.lists(st.integers(0, 12)))
def test_merged_runs_keep_the_blocks_in_order(blocks: list[int]) -> None:
    runs = list(merged(tuple(blocks)))
    assert [block for first, count in runs for block in range(first, first + count)] == blocks
    assert all(a + n != b for (a, n), (b, _) in pairwise(runs))


@pytest.mark.parametrize(("skip", "tokens"), [(-1, 1), (0, -1), (0, 5), (3, 2)])
def test_tokens_outside_the_blocks_are_rejected(skip: int, tokens: int) -> None:
    geometry = Geometry(Layout((Field("a", "uint8", 1),)), 4, 2)
    with pytest.raises(ValueError, match="outside"):
        list(geometry.spans((0, 1), skip, tokens))


A, B, C = Field("a", "bfloat16", 8), Field("b", "int32", 1), Field("a", "float32", 8)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ((A, B), (A, B), None),
        ((A, B), (C, B), "a bfloat16[8] here, a float32[8] there"),
        ((A, B), (A,), "b only here"),
        ((A,), (A, B), "b only there"),
        ((A, B), (B, A), "the same fields in another order"),
    ],
)
def test_a_difference_names_the_fields(ours: tuple[Field, ...], theirs: tuple[Field, ...], difference: str) -> None:
    assert Layout(ours).difference(Layout(theirs)) == difference


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (A, A),
        tuple(Field(f"f{i}", "uint8", 1) for i in range(MAX_FIELDS + 1)),
        (Field("", "uint8", 1),),
        (Field("x" * 65, "uint8", 1),),
        (Field("a", "float64", 1),),
        (Field("a", "uint8", 0),),
        (Field("a", "uint8", (1 << 20) + 1),),
        tuple(Field(f"f{i}", "float32", 1 << 20) for i in range(5)),
    ],
)
def test_an_invalid_layout_is_rejected(fields: tuple[Field, ...]) -> None:
    with pytest.raises(LayoutMismatch):
        Layout(fields).validate()


@pytest.mark.parametrize(
    ("blocks", "size"), [(0, 1), (1, 0), ((1 << 32) + 1, 1), (1, (1 << 20) + 1), (1 << 32, 1 << 20)]
)
def test_a_geometry_out_of_bounds_is_rejected(blocks: int, size: int) -> None:
    with pytest.raises(LayoutMismatch):
        Geometry(Layout((A,)), blocks, size).validate()
