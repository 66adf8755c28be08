"""The words of refusals: a format has the article with which its name is spoken."""

from __future__ import annotations

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.media import formats
from embferry.serve.media.formats import sniff, with_article
from tests.serve import pictures

AN = {"AVI", "AVIF", "ASF/WMV", "FLV", "HEIC", "ICO", "MP4", "MPEG-PS", "MPEG-TS", "Ogg"}
A = {
    "BMP", "GIF", "JPEG", "JPEG 2000", "Matroska/WebM", "PNG", "PPM", "QuickTime", "TGA", "TIFF", "WebP",
}  # fmt: skip


def test_every_format_has_its_article() -> None:
    known = {form.name for _, form in formats._SIGNATURES} | {form.name for form in formats._BRANDS.values()}
    known |= {formats._MOV.name, formats._TGA.name}
    assert known == A | AN
    assert {name for name in known if with_article(name) == f"an {name}"} == AN
    assert {name for name in known if with_article(name) == f"a {name}"} == A


def test_a_refusal_uses_it() -> None:
    with pytest.raises(ServeError) as refused:
        sniff(pictures.video(3), "image")
    assert refused.value.detail == "the file is an MP4 video; this part takes a picture"
