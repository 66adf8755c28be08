"""Sizes of pictures by their headers, and grids by the arithmetic of a processor."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from embferry.models.grid_rule import KEY, GridRule, rule_in
from embferry.serve.vllm.picture_sizes import picture_size

QWEN = {"field": "image_grid_thw", "patch": 14, "factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}


def file(form: str, size: tuple[int, int] = (333, 77), **options: Any) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, form, **options)
    return data.getvalue()


FILES = {
    "PNG": file("PNG"),
    "JPEG": file("JPEG"),
    "progressive JPEG": file("JPEG", progressive=True),
    "JPEG with a profile": file("JPEG", icc_profile=b"\xff\xc0" * 20_000),
    "WebP": file("WEBP"),
    "lossless WebP": file("WEBP", lossless=True),
    "WebP with a profile": file("WEBP", icc_profile=b"profile"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_header_has_the_size(name: str) -> None:
    assert picture_size(FILES[name]) == (333, 77)


@pytest.mark.parametrize("name", FILES)
def test_a_header_that_is_cut_short_or_damaged_does_no_harm(name: str) -> None:
    data = FILES[name]
    for end in range(min(len(data), 200)):
        picture_size(data[:end])
    for at in range(min(len(data), 200)):
        picture_size(data[:at] + b"\xff" + data[at + 1 :])
        picture_size(data[:at] + b"\0" + data[at + 1 :])


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_have_no_size_here(form: str) -> None:
    assert picture_size(file(form)) is None
    assert picture_size(b"") is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    assert picture_size(file("JPEG", exif=exif)) == ((77, 333) if orientation >= 5 else (333, 77))


def test_a_webp_with_exif_has_no_size_here() -> None:
    """The block is at the end of the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture_size(file("WEBP", exif=exif)) is None


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_counts_as_upright(exif: bytes) -> None:
    assert picture_size(file("JPEG", exif=b"Exif\0\0" + exif)) == (333, 77)


def test_grids_are_those_of_the_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # brings torch with it

    rule = rule_in({KEY: QWEN})
    assert rule is not None
    limits = {"factor": 28, "min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}
    sides = (1, 13, 14, 42, 55, 56, 57, 98, 126, 448, 999, 1000, 1001, 4000, 12_345)
    for width in sides:
        for height in sides:
            found = rule.metadata(width, height)
            if max(width, height) > 200 * min(width, height):
                assert found is None
                continue
            rows, columns = smart_resize(height, width, **limits)
            assert found == {"image_grid_thw": [1, rows // 14, columns // 14]}, (width, height)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (1, 201)])
def test_impossible_pictures_have_no_grid(size: tuple[int, int]) -> None:
    assert GridRule("grid", 14, 28, 1, 1000).metadata(*size) is None


WRONG: list[Any] = [None, 5, {}, QWEN | {"patch": 0}, QWEN | {"factor": "28"}, QWEN | {"field": None}, {"\ud800": 1}]


@pytest.mark.parametrize("told", WRONG)
def test_a_rule_that_cannot_be_read_is_none(told: Any) -> None:
    entry = {KEY: told, "metadata": {}}
    assert rule_in(entry) is None
    assert entry == {"metadata": {}}
