"""Two embeddings share a key only if everything that decides them is equal."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embferry.connectors.vllm import item_key as module
from embferry.connectors.vllm.item_key import Item, item_key


def elements(**data: Any) -> dict[str, Any]:
    return {name: SimpleNamespace(data=value) for name, value in data.items()}


PIXELS = torch.arange(24, dtype=torch.float32).reshape(4, 6)
ITEM = Item("name", "image", elements(pixel_values=PIXELS, image_grid_thw=torch.tensor([1, 2, 2])), 4)
OTHERS = [
    ITEM._replace(mm_hash="another"),
    ITEM._replace(modality="video"),
    ITEM._replace(tokens=5),
    ITEM._replace(data=elements(pixel_values=PIXELS)),
    ITEM._replace(data=elements(pixel_values=PIXELS, image_grid_thw=torch.tensor([1, 1, 4]))),
    ITEM._replace(data=elements(pixel_values=PIXELS, video_grid_thw=torch.tensor([1, 2, 2]))),
    ITEM._replace(data=elements(pixel_values=PIXELS.reshape(6, 4), image_grid_thw=torch.tensor([1, 2, 2]))),
    ITEM._replace(data=elements(pixel_values=PIXELS.view(torch.int32), image_grid_thw=torch.tensor([1, 2, 2]))),
    ITEM._replace(data=elements(pixel_values=[PIXELS], image_grid_thw=torch.tensor([1, 2, 2]))),
    ITEM._replace(data=elements(pixel_values=[*PIXELS], image_grid_thw=torch.tensor([1, 2, 2]))),
    ITEM._replace(data=elements(pixel_values=PIXELS, image_grid_thw=torch.tensor([1, 2, 2]), seconds=1.0)),
    ITEM._replace(data=elements(pixel_values=PIXELS, image_grid_thw=torch.tensor([1, 2, 2]), seconds=1)),
    ITEM._replace(data=elements(pixel_values=PIXELS, image_grid_thw=torch.tensor([1, 2, 2]), seconds="1")),
    ITEM._replace(data=elements(pixel_values=PIXELS + 1, image_grid_thw=torch.tensor([1, 2, 2]))),
]


def test_everything_that_decides_an_embedding_is_in_its_key() -> None:
    keys = [item_key(b"model", item) for item in (ITEM, *OTHERS)] + [item_key(b"another", ITEM)]
    assert all(len(key) == 64 for key in keys)
    assert len(set(keys)) == len(keys)


def test_the_key_is_that_of_the_content() -> None:
    again = Item("name", "image", copy.deepcopy(dict(reversed(ITEM.data.items()))), 4)
    assert item_key(b"model", again) == item_key(b"model", ITEM)
    strided = torch.stack([PIXELS, PIXELS], -1)[..., 0]
    assert not strided.is_contiguous()
    assert item_key(b"model", ITEM._replace(data={**ITEM.data, **elements(pixel_values=strided)})) == (
        item_key(b"model", ITEM)
    )


@pytest.mark.parametrize(
    "data", [None, object(), torch.zeros(3, device="meta"), torch.zeros(3, 3).to_sparse(), np.zeros(3), [None]]
)
def test_an_item_that_is_not_here_has_no_key(data: Any) -> None:
    assert item_key(b"model", ITEM._replace(data=elements(pixel_values=data))) == ""


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_every_dtype_and_shape_has_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert item_key(b"model", ITEM._replace(data=elements(pixel_values=torch.zeros(shape, dtype=dtype))))


leaves = st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(
    st.dictionaries(st.text(max_size=3), values, max_size=3), st.dictionaries(st.text(max_size=3), values, max_size=3)
)
def test_no_two_contents_are_written_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Without the digest: what is digested says where each part begins and ends."""
    written = [bytearray(), bytearray()]
    for data, out in zip((one, two), written, strict=True):
        module._add(out.extend, dict(sorted(data.items())))
    assert (written[0] == written[1]) == (repr(sorted(one.items())) == repr(sorted(two.items())))


def test_names_do_not_run_into_each_other() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc")]
    assert len({item_key(b"", ITEM._replace(modality=one, mm_hash=two)) for one, two in pairs}) == 3
