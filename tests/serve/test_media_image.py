"""Pictures: the code of each refusal, and the conversion of valid pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from embferry.serve.config import MediaSettings
from embferry.serve.errors import CODES, ServeError
from embferry.serve.media.image import check_image, decode_image
from tests.serve import pictures

LIMITS = MediaSettings(max_bytes=200_000, max_pixels=1_000_000, max_side=5_000)

FOUND_IN_HEADER = {
    "no bytes": (b"", "media_empty"),
    "random bytes": (np.random.default_rng(1).bytes(500), "unsupported_media_type"),
    "text": (b"hello, this is not a picture", "unsupported_media_type"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_media_type"),
    "svg with declaration": (b'<?xml version="1.0"?><svg/>', "unsupported_media_type"),
    "web page": (b"<!DOCTYPE html><html></html>", "unsupported_media_type"),
    "heic without a picture": (b"\0\0\0\x18ftypheic" + bytes(50), "image_corrupt"),
    "too many bytes": (b"\xff\xd8\xff" + bytes(200_000), "media_too_large"),
    "a video": (pictures.video(3), "wrong_media_kind"),
    "0 wide": (pictures.claimed_png(0, 5), "media_zero_size"),
    "0 × 0": (pictures.claimed_png(0, 0), "media_zero_size"),
    "0 high gif": (b"GIF89a" + bytes(20), "media_zero_size"),
    "enormous side": (pictures.claimed_png(5_001, 100), "media_side_too_long"),
    "extreme ratio": (pictures.claimed_png(4_000, 19), "media_aspect_ratio"),
    "bomb": (pictures.claimed_png(4_000, 4_000), "media_too_many_pixels"),
    "bomb that PIL would refuse too": (pictures.claimed_png(60_000, 60_000), "media_side_too_long"),
    "cut in the signature": (pictures.png()[:8], "image_truncated"),
    "cut in the header": (pictures.encoded(pictures.noise(), "JPEG")[:30], "image_truncated"),
}
FOUND_IN_PIXELS = {
    "png cut": (pictures.encoded(pictures.noise())[:4000], "image_truncated"),
    "jpeg cut": (pictures.encoded(pictures.noise(), "JPEG")[:-500], "image_truncated"),
    "webp cut": (pictures.encoded(pictures.noise(), "WEBP")[:-500], None),
    "png without pixels": (pictures.claimed_png(10, 10), "image_truncated"),
}


@pytest.mark.parametrize("name", FOUND_IN_HEADER)
def test_a_bad_header_is_refused_before_any_pixel_is_decoded(name: str) -> None:
    data, code = FOUND_IN_HEADER[name]
    for read in (check_image, decode_image):
        with pytest.raises(ServeError) as caught:
            read(data, LIMITS)
        assert caught.value.code == code
        assert caught.value.http_status == CODES[code][0] < 500


@pytest.mark.parametrize("name", FOUND_IN_PIXELS)
def test_bad_pixels_are_refused_when_decoded(name: str) -> None:
    data, code = FOUND_IN_PIXELS[name]
    with pytest.raises(ServeError) as caught:
        decode_image(data, LIMITS)
    assert caught.value.code in ((code,) if code else ("image_truncated", "image_corrupt"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_flipped_byte_gives_a_picture_or_a_refusal(form: str) -> None:
    whole = bytearray(pictures.encoded(pictures.noise(12, 9), form))
    rng = np.random.default_rng(3)
    refused = []
    for at in sorted({*range(60), *rng.integers(0, len(whole), 60).tolist()}):
        damaged = bytearray(whole)
        damaged[at % len(whole)] ^= int(rng.integers(1, 256))
        try:
            assert decode_image(bytes(damaged), LIMITS).mode == "RGB"
        except ServeError as error:
            refused.append(error.http_status)
    assert refused
    assert {400 <= status < 500 for status in refused} == {True}


def test_grey_of_16_bits_keeps_its_brightness() -> None:
    ramp = Image.fromarray(np.array([[0, 257 * 100, 257 * 255]], np.uint16))
    assert ramp.mode.startswith("I;16")
    pixels = np.asarray(decode_image(pictures.encoded(ramp), LIMITS))
    assert pixels[0].tolist() == [[0, 0, 0], [100, 100, 100], [255, 255, 255]]


def test_cmyk_becomes_rgb() -> None:
    data = pictures.encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = decode_image(data, LIMITS).getpixel((8, 8))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), 0)
    assert decode_image(pictures.encoded(image), LIMITS).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (2, 1), 3)
    image.putpalette([9, 9, 9] * 256)
    image.putpixel((1, 0), 4)
    decoded = decode_image(pictures.encoded(image, "GIF", transparency=3), LIMITS)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = pictures.noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = pictures.encoded(image, "PNG", exif=exif)
    decoded = decode_image(stored, LIMITS)
    assert decoded.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(stored))).tobytes()
    assert decoded.size == ((6, 4) if orientation < 5 else (4, 6))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_ignored() -> None:
    data = pictures.encoded(pictures.noise(6, 4), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 30)
    assert decode_image(data, LIMITS).size == (6, 4)


def test_a_single_gif_frame_is_a_picture() -> None:
    assert check_image(pictures.gif(1), LIMITS) == (20, 10)
    assert decode_image(pictures.gif(1), LIMITS).size == (20, 10)


def test_of_several_pictures_in_a_jpeg_the_first_is_used() -> None:
    first, second = pictures.noise(8, 8), Image.new("RGB", (4, 4))
    data = pictures.encoded(first, "MPO", save_all=True, append_images=[second])
    assert decode_image(data, LIMITS).size == (8, 8)
