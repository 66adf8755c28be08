"""The file of one embedding: the safetensors library reads it, and no changed byte goes unnoticed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embferry.cache.contract import verify
from embferry.cache.entry import DTYPES, MAX_HEAD, MAX_MODEL, Damaged, Entry, checked, digest_of, model_label, parse
from embferry.connectors.shared import shape as connectors
from embferry.protocol.layout import ITEM_BYTES, MAX_FIELDS, MAX_NAME, MAX_WIDTH, Field, Layout

from .samples import key_of, sample

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_NAME)
fields = st.builds(Field, names, st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 64))
layouts = st.builds(Layout, st.lists(fields, min_size=1, max_size=4, unique_by=lambda field: field.name).map(tuple))
RAW = bytearray(sample("a")[0].head() + bytes(sample("a")[1]))
MODEL = RAW.index(b"a model")


def read(raw: bytes) -> Entry:
    """Reads what a file has, as a store does for the key of "a"."""
    entry, length = parse(raw[:MAX_HEAD], len(raw))
    if entry.key != key_of("a"):
        raise Damaged("another key")
    verify(entry, memoryview(raw)[length:])
    return entry


def test_every_dtype_has_a_name_in_the_format() -> None:
    assert set(DTYPES) == set(ITEM_BYTES)


def test_the_digest_of_one_field_is_that_of_the_connectors() -> None:
    """A producer need not compute a second one."""
    shape = connectors.Shape(5, 3, "float32")
    rows = np.arange(60, dtype=np.uint8).reshape(5, 12)
    assert digest_of(shape.layout, 5, lambda at, end: (rows.reshape(-1).data[at:end],)) == (
        connectors.digest_of(rows, shape).hex()
    )


@given(layouts, st.integers(1, 1000), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200))
def test_a_head_is_read_as_it_was_written(layout: Layout, tokens: int, model: str) -> None:
    entry = Entry(key_of("a"), layout, tokens, "0" * 32, model)
    if "__metadata__" in {field.name for field in layout.fields}:
        return
    head = checked(entry).head()
    assert len(head) % 8 == 0
    assert parse(head + b"more", len(head) + entry.nbytes) == (entry, len(head))


def test_a_field_cannot_have_the_name_of_the_metadata() -> None:
    layout = Layout((Field("__metadata__", "uint8", 1),))
    with pytest.raises(ValueError, match="cannot be kept"):
        checked(Entry(key_of("a"), layout, 1, "0" * 32))


@given(st.binary(max_size=600), st.integers(0, 1 << 70))
@example(b"\x02" + bytes(7) + b"{}", 10)
@example(b"\xff" * 8, 8)
def test_other_bytes_are_damaged(start: bytes, total: int) -> None:
    with pytest.raises(Damaged):
        parse(start, total)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["format", "key", "layout", "tokens", "digest", "model", "more"]), values),
    st.dictionaries(st.text(max_size=20), values, max_size=2),
)
def test_other_statements_are_damaged(said: dict[str, Any], tensors: dict[str, Any]) -> None:
    original = json.loads(RAW[8 : 8 + int.from_bytes(RAW[:8], "little")])
    changed = {**original, "__metadata__": {**original["__metadata__"], **said}, **tensors}
    if changed == original:
        return
    text = json.dumps(changed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text + bytes(sample("a")[1])
    try:
        entry = read(raw)
    except Damaged:
        return
    assert entry == Entry(**{**_plain(sample("a")[0]), "model": said.get("model")})  # all that may differ


@given(st.integers(0, len(RAW) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    """But for the name of the model, which is for people."""
    raw = bytes(RAW[:at] + bytes([RAW[at] ^ change]) + RAW[at + 1 :])
    if MODEL <= at < MODEL + len(b"a model"):
        return
    with pytest.raises(Damaged):
        read(raw)


@given(st.integers(0, len(RAW) - 1))
def test_a_cut_file_is_noticed(length: int) -> None:
    with pytest.raises(Damaged):
        read(bytes(RAW[:length]))


def test_more_bytes_are_noticed() -> None:
    with pytest.raises(Damaged):
        read(bytes(RAW) + b"\0")


def test_the_safetensors_library_reads_it(tmp_path: Any) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load

    layout = Layout(tuple(Field(name, name, width) for width, name in enumerate(sorted(ITEM_BYTES), 1)))
    entry, data = sample("a", 7, layout)
    raw = checked(entry).head() + bytes(data)
    tensors, at = load(raw), 0
    for field in layout.fields:
        tensor = tensors[field.name]
        assert (tensor.shape, tensor.dtype) == ((7, field.width), getattr(torch, field.dtype))
        end = at + 7 * field.token_bytes
        assert tensor.view(torch.uint8).numpy().tobytes() == bytes(data[at:end])
        at = end
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with safe_open(path, "pt") as file:
        assert file.metadata()["digest"] == entry.digest
        assert file.metadata()["key"] == key_of("a")


def test_the_largest_layout_can_be_kept() -> None:
    layout = Layout(tuple(Field(f"{at:064}", "bfloat16", MAX_WIDTH // MAX_FIELDS) for at in range(MAX_FIELDS)))
    assert len(checked(Entry(key_of("a"), layout, 1 << 32, "0" * 32, "m" * 200)).head()) <= MAX_HEAD


@pytest.mark.parametrize(
    "changes",
    [{"key": "A" * 64}, {"key": "0" * 63}, {"tokens": 0}, {"digest": ""}, {"model": "ü"}, {"model": "\n"}],
)
def test_an_entry_that_could_not_be_read_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be kept"):
        checked(Entry(**{**_plain(sample("a")[0]), **changes}))


def _plain(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in Entry.__struct_fields__}


def test_the_name_of_a_model_is_printable_and_short() -> None:
    assert model_label("a\x1b[31mmödel") == "a?[31mm?del"
    assert len(model_label("x" * 1000)) == MAX_MODEL
