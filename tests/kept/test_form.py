"""The form of a file, pure: records that are cut or changed at any byte, heads of other embeddings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.kept.form import HEAD_BYTES, PAGE, RECORD_BYTES, Head, Record, read_records, record_at
from embferry.protocol.layout import ALIGNMENT, Field, Layout
from tests.transfer.conftest import LAYOUT

TOTAL = 64
HEAD = Head(LAYOUT, b"digest", TOTAL)
OTHERS = (
    Head(LAYOUT, b"another", TOTAL),
    Head(LAYOUT, b"digest\0", TOTAL),
    Head(LAYOUT, b"digest", TOTAL + 1),
    Head(Layout(LAYOUT.fields[:-1]), b"digest", TOTAL),
    Head(Layout(LAYOUT.fields[::-1]), b"digest", TOTAL),
    Head(Layout((Field("input_embeddings", "float16", 24), *LAYOUT.fields[1:])), b"digest", TOTAL),
)


@st.composite
def chunks(draw: st.DrawFn) -> list[Record]:
    """Draws chunks of one embedding in the order of their arrival."""
    cuts = sorted(draw(st.sets(st.integers(1, TOTAL - 1), max_size=8)))
    found = [
        Record(a, b - a, draw(st.binary(min_size=8, max_size=8))) for a, b in itertools.pairwise([0, *cuts, TOTAL])
    ]
    return draw(st.permutations(found))


def journal(records: list[Record]) -> bytes:
    return b"".join(record.encoded(index) for index, record in enumerate(records))


@given(chunks(), st.data())
def test_what_is_cut_at_any_byte_says_what_was_written_before(records: list[Record], data: st.DataObject) -> None:
    whole = journal(records)
    cut = data.draw(st.integers(0, len(whole)))
    written = whole[:cut].ljust(TOTAL * RECORD_BYTES, b"\0")
    found = list(read_records(written, TOTAL))
    assert found in (records[: cut // RECORD_BYTES], records[: -(-cut // RECORD_BYTES)])
    assert list(read_records(whole[:cut], TOTAL)) == records[: cut // RECORD_BYTES]


@given(chunks(), st.data())
def test_a_changed_byte_ends_what_is_read(records: list[Record], data: st.DataObject) -> None:
    whole = bytearray(journal(records))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    assert list(read_records(bytes(whole), TOTAL)) == records[: at // RECORD_BYTES]


@given(chunks(), st.data())
def test_a_record_counts_in_its_own_place_alone(records: list[Record], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(records) - 1))
    moved = [records[at].encoded(at + 1 + data.draw(st.integers(0, 9)))]
    assert list(read_records(b"".join(moved), TOTAL)) == []


@given(st.binary(max_size=300))
def test_noise_says_nothing(noise: bytes) -> None:
    assert list(read_records(noise, TOTAL)) == []


@pytest.mark.parametrize(
    "records",
    [
        [Record(0, 0, bytes(8))],
        [Record(0, TOTAL + 1, bytes(8))],
        [Record(TOTAL, 1, bytes(8))],
        [Record(1 << 63, 1 << 63, bytes(8))],
    ],
)
def test_a_record_outside_of_the_embedding_is_not_read(records: list[Record]) -> None:
    assert list(read_records(journal(records), TOTAL)) == []


def test_no_token_is_read_twice() -> None:
    records = [Record(0, 8, bytes(8)), Record(4, 8, bytes(8)), Record(12, 4, bytes(8))]
    assert list(read_records(journal(records), TOTAL)) == records[:1]


def test_no_more_records_are_read_than_there_are_tokens() -> None:
    records = [Record(0, 1, bytes(8)), Record(1, 1, bytes(8)), Record(2, 1, bytes(8))]
    assert list(read_records(journal(records), 2)) == records[:2]


@pytest.mark.parametrize("other", OTHERS)
def test_another_embedding_has_another_head_and_another_key(other: Head) -> None:
    assert other.encoded != HEAD.encoded
    assert other.key != HEAD.key


@given(st.integers(1, 300), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_head_records_and_fields_do_not_overlap(total: int, widths: list[int]) -> None:
    layout = Layout(tuple(Field(f"field {n}", "uint8", width) for n, width in enumerate(widths)))
    head = Head(layout, b"digest", total)
    assert len(head.encoded) == HEAD_BYTES
    assert record_at(total) <= head.rows_at
    assert head.rows_at % PAGE == 0
    rows = np.zeros(head.fields_at[-1], np.uint8)
    arrays = head.arrays(rows)
    for name, array in arrays.items():
        assert array.shape == (total, next(f for f in layout.fields if f.name == name).token_bytes)
        assert array.flags.c_contiguous
        assert (array.ctypes.data - rows.ctypes.data) % ALIGNMENT == 0
        array += 1
    assert rows.max() == 1
    assert rows.sum() == total * layout.token_bytes
