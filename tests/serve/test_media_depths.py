"""Pictures of 1 to 32 bits per channel: the transparent colour of PNG, and the grey of TIFF."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embferry.serve.media.image import check_image, decode_image
from embferry.serve.media.video import check_video, decode_video
from tests.serve import pictures
from tests.serve.test_media_pictures import LIMITS, chunk, refused

GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6
WHITE = [255, 255, 255]


def png(samples: NDArray[np.int64], depth: int, *before: bytes, kind: int | None = None, interlaced: int = 0) -> bytes:
    """Returns a PNG of samples (rows, columns, channels) of ``depth`` bits, with chunks before its pixels.

    ``interlaced`` only for pictures of one pixel, which are the same then.
    """
    height, width, channels = samples.shape
    kind = {1: GREY, 3: RGB}[channels] if kind is None else kind
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    rows = b"".join(b"\0" + packed(row.reshape(-1), depth) for row in samples)
    parts = (chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed(row: NDArray[np.int64], depth: int) -> bytes:
    bits = (row[:, None] >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()


def transparent(*colour: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))


def pixels(data: bytes) -> list[list[int]]:
    return np.asarray(decode_image(data, LIMITS)).reshape(-1, 3).tolist()  # type: ignore[no-any-return]


def test_a_transparent_colour_of_16_bits_that_no_pixel_has_changes_none() -> None:
    samples = np.full((128, 128, 3), 0xFFFF)
    samples[32:96, 32:96] = (0xC800, 0, 0)
    decoded = decode_image(png(samples, 16, transparent(0x00C8, 0, 0)), LIMITS)
    assert decoded.getpixel((64, 64)) == (0xC8, 0, 0)
    assert decoded.tobytes() == decode_image(png(samples, 16), LIMITS).tobytes()


COLOUR = (0x8000, 0x4000, 0xC000)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(
    ("key", "is_clear"),
    [
        (COLOUR, True),
        ((0x80, 0x40, 0xC0), False),
        ((0x8001, 0x4000, 0xC000), False),
        ((0x8000, 0x4000, 0xC0FF), False),
        ((0x8000, 0x40FF, 0xC000), False),
        ((0, 0, 0), False),
    ],
)
def test_only_pixels_of_the_very_colour_of_16_bits_are_transparent(
    key: tuple[int, int, int], is_clear: bool, interlaced: int
) -> None:
    data = png(np.array([[COLOUR]]), 16, transparent(*key), interlaced=interlaced)
    assert pixels(data) == [WHITE if is_clear else [0x80, 0x40, 0xC0]]


def test_pixels_that_differ_in_the_lower_bytes_are_told_apart() -> None:
    """Also where filters of rows make use of the neighbours."""
    rng = np.random.default_rng(2)
    samples = np.array(COLOUR) + rng.integers(0, 2, (16, 16, 3))
    raw = samples.astype(">u2").view(np.uint8).reshape(16, -1)
    left = np.concatenate([raw[:, :6] * 0, raw[:, :-6]], axis=1)
    rows = b"".join(b"\1" + row.tobytes() for row in raw - left)
    unfiltered = png(samples, 16, transparent(*COLOUR))
    data = unfiltered[: unfiltered.index(b"IDAT") - 4] + chunk(b"IDAT", zlib.compress(rows)) + unfiltered[-12:]
    found = (np.asarray(decode_image(data, LIMITS)) == 255).all(axis=2)
    assert 0 < found.sum() < 256
    assert (found == (samples == COLOUR).all(axis=2)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_every_depth(depth: int) -> None:
    most = (1 << depth) - 1
    values = sorted({0, 1, most // 2, most - 1, most} & set(range(most + 1)))
    for key in values:
        found = pixels(png(np.array(values).reshape(1, -1, 1), depth, transparent(key)))
        greys = [(value * 255 + most // 2) // most for value in values]
        assert found == [WHITE if value == key else [grey] * 3 for value, grey in zip(values, greys, strict=True)]


def test_bits_of_a_transparent_colour_above_those_of_the_picture_do_not_count() -> None:
    """As libpng reads them."""
    assert pixels(png(np.array([[[5], [6]]]), 4, transparent(0xFF05))) == [WHITE, [102] * 3]
    assert pixels(png(np.array([[[5, 6, 7], [6, 6, 7]]]), 8, transparent(0x105, 6, 7))) == [WHITE, [6, 6, 7]]


PALETTE_OF_4 = chunk(b"PLTE", bytes(range(12)))
DAMAGED = {
    "two bytes for RGB": (RGB, chunk(b"tRNS", b"\0\5")),
    "eight bytes for RGB": (RGB, chunk(b"tRNS", bytes(8))),
    "nothing for RGB": (RGB, chunk(b"tRNS", b"")),
    "nothing for grey": (GREY, chunk(b"tRNS", b"")),
    "one byte for grey": (GREY, chunk(b"tRNS", b"\0")),
    "six bytes for grey": (GREY, chunk(b"tRNS", bytes(6))),
    "300 of a palette of 4": (PALETTE, PALETTE_OF_4 + chunk(b"tRNS", bytes(300))),
    "5 of a palette of 4": (PALETTE, PALETTE_OF_4 + chunk(b"tRNS", bytes(5))),
    "nothing for a palette": (PALETTE, PALETTE_OF_4 + chunk(b"tRNS", b"")),
    "before the palette": (PALETTE, chunk(b"tRNS", b"\0") + PALETTE_OF_4),
    "a picture with alpha": (RGBA, chunk(b"tRNS", bytes(6))),
    "a wrong checksum": (RGB, chunk(b"tRNS", bytes(6), 1)),
    "a wrong checksum of a palette": (PALETTE, PALETTE_OF_4 + chunk(b"tRNS", b"\0", 1)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_chunk_of_transparency_is_passed_over(name: str) -> None:
    kind, chunks = DAMAGED[name]
    channels = {RGB: 3, RGBA: 4}.get(kind, 1)
    samples = np.zeros((4, 4, channels), np.int64)
    if kind == RGBA:
        samples[:, :, 3] = 255
    data = png(samples, 8, chunks, kind=kind)
    assert check_image(data, LIMITS) == (4, 4)
    assert pixels(data) == [[0, 1, 2] if kind == PALETTE else [0, 0, 0]] * 16


def test_of_two_chunks_of_transparency_the_first_counts_and_none_behind_the_pixels() -> None:
    samples = np.array([[[3], [4]]])
    assert pixels(png(samples, 8, transparent(3), transparent(4))) == [WHITE, [4] * 3]
    data = png(samples, 8)
    assert pixels(data[:-12] + transparent(3) + data[-12:]) == [[3] * 3, [4] * 3]


def test_a_palette_of_few_colours_keeps_its_transparency() -> None:
    data = png(np.array([[[0], [1], [2], [3]]]), 2, PALETTE_OF_4, chunk(b"tRNS", b"\xff\0"), kind=PALETTE)
    assert pixels(data) == [[0, 1, 2], WHITE, [6, 7, 8], [9, 10, 11]]


def animation_of(
    frames: Sequence[NDArray[np.int64]],
    depth: int,
    *before: bytes,
    disposal: int = 0,
    over: int = 0,
    kind: int | None = None,
) -> bytes:
    """Returns an animated PNG. Its first frame covers the picture, the others its part from (1, 1) on."""
    stills = [png(samples, depth, kind=kind) for samples in frames]
    controls = [
        struct.pack(">IIIIHHBB", *samples.shape[1::-1], *((1, 1) if number else (0, 0)), 1, 2, disposal, over)
        for number, samples in enumerate(frames)
    ]
    data = stills[0][:33] + chunk(b"acTL", struct.pack(">II", len(frames), 0)) + b"".join(before)
    number = 0
    for still, control in zip(stills, controls, strict=True):
        data += chunk(b"fcTL", number.to_bytes(4) + control)
        pixels = still[still.index(b"IDAT") + 4 : -16]
        data += chunk(b"fdAT", (number + 1).to_bytes(4) + pixels) if number else chunk(b"IDAT", pixels)
        number += 2 if number else 1
    return data + chunk(b"IEND", b"")


def shown(data: bytes) -> list[list[Any]]:
    """Returns the pixels of the frames of an animation."""
    assert check_video(data, LIMITS).count == 3
    return [np.asarray(frame).tolist() for frame in decode_video(data, LIMITS, 2).frames]


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("disposal", [0, 1, 2])
@pytest.mark.parametrize(
    ("depth", "kind"), [(8, GREY), (8, RGB), (8, PALETTE), (8, RGBA), (16, GREY), (16, RGB), (16, RGBA)]
)
def test_frames_of_an_animation_with_transparent_parts(depth: int, kind: int, disposal: int, over: int) -> None:
    """They are put together as the format says at every depth, and transparent parts are white."""
    clear, red, blue, none = 0, 1, 2, 3
    marks = [np.full((4, 4), red), np.full((2, 2), blue), np.full((2, 2), red)]
    marks[0][0, 0] = marks[1][0, 0] = marks[2][1, 1] = clear
    own = {clear: (9, 9, 9, 0), red: (255, 0, 0, 255), blue: (0, 0, 255, 255)}
    greys = {clear: 9, red: 200, blue: 50}
    spread = 257 if depth == 16 else 1
    if kind == GREY:
        frames = [np.vectorize(greys.get)(mark)[:, :, None] * spread for mark in marks]
        before = [transparent(9 * spread)]
    elif kind == PALETTE:
        frames = [mark[:, :, None] for mark in marks]
        before = [chunk(b"PLTE", bytes((9, 9, 9, 255, 0, 0, 0, 0, 255))), chunk(b"tRNS", b"\0")]
    else:
        channels = 3 if kind == RGB else 4
        frames = [np.array([[own[one][:channels] for one in row] for row in mark.tolist()]) * spread for mark in marks]
        before = [transparent(*[9 * spread] * 3)] if kind == RGB else []
    canvas = np.full((4, 4), none)
    expected = []
    for number, mark in enumerate(marks):
        at = slice(1, 3) if number else slice(0, 4)
        earlier = canvas.copy()
        canvas[at, at] = np.where(mark == clear, canvas[at, at], mark) if over else mark
        expected.append(canvas.copy())
        if disposal == 2 and number:
            canvas = earlier
        elif disposal:
            canvas[at, at] = none
    colours = {clear: WHITE, none: WHITE, red: [255, 0, 0], blue: [0, 0, 255]}
    if kind == GREY:
        colours |= {red: [200] * 3, blue: [50] * 3}
    found = shown(animation_of(frames, depth, *before, disposal=disposal, over=over, kind=kind))
    assert found == [[[colours[one] for one in row] for row in frame.tolist()] for frame in expected]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_of_16_bits_has_no_pixel_that_should_not_be_transparent(channels: int) -> None:
    samples = np.full((4, 4, channels), 0xC8C8)
    data = animation_of([samples, samples[:2, :2], samples[:2, :2]], 16, transparent(*[0xC8] * channels))
    assert shown(data) == [[[[0xC8] * 3] * 4] * 4] * 3


@pytest.mark.parametrize("at", [0, 4, 8, 12, 16])
def test_a_frame_that_does_not_fit_is_refused(at: int) -> None:
    """Whichever number of its header is wrong: of the frame, its width or height, its place."""
    samples = np.full((4, 4, 3), 200)
    data = animation_of([samples, samples[:2, :2], samples[:2, :2]], 8)
    place = data.rindex(b"fcTL")
    wrong = data[place + 4 : place + 4 + at] + (9).to_bytes(4) + data[place + 8 + at : place + 30]
    odd = data[: place - 4] + chunk(b"fcTL", wrong) + data[place + 34 :]
    assert refused(odd, read=lambda *a: decode_video(*a, 2)).code == "video_corrupt"


def grey_tiff(value: int, bits: int, photometric: int, sample_format: int | None = None, order: str = "<") -> bytes:
    """Returns a TIFF of 4 × 2 pixels of one grey."""
    row = packed(np.full(4, value), bits)
    if order == "<" and bits > 12:
        row = np.frombuffer(row, f"u{bits // 8}").byteswap().tobytes()
    entries = [(256, 4), (257, 2), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1), (278, 2)]
    entries.append((279, 2 * len(row)))
    if sample_format is not None:
        entries.append((339, sample_format))
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    head += b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, number, 0) for tag, number in entries)
    return head.ljust(200, b"\0") + row * 2


@pytest.mark.parametrize(
    ("value", "bits", "photometric", "order", "grey"),
    [
        (0x2000, 16, 0, "<", 223),
        (0, 16, 0, "<", 255),
        (0xFFFF, 16, 0, "<", 0),
        (0x2000, 16, 1, "<", 32),
        (0x2000, 16, 1, ">", 32),
        (0xFFFF, 16, 1, ">", 255),
        (0x800, 12, 1, "<", 128),
        (0xFFF, 12, 1, "<", 255),
        (0, 12, 1, "<", 0),
        (0x80000000, 32, 1, "<", 128),
        (0x7FFFFFFF, 32, 1, "<", 127),
        (0xFFFFFFFF, 32, 1, "<", 255),
        (0x12345678, 32, 1, "<", 0x12),
        (0x10000, 32, 1, "<", 0),
        (2, 4, 0, "<", 221),
        (100, 8, 0, "<", 155),
    ],
)
def test_the_grey_of_a_tiff(value: int, bits: int, photometric: int, order: str, grey: int) -> None:
    data = grey_tiff(value, bits, photometric, order=order)
    assert check_image(data, LIMITS) == (4, 2)
    assert pixels(data) == [[grey] * 3] * 8


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_tiff_of_signed_numbers_is_refused_by_name(bits: int) -> None:
    refusal = refused(grey_tiff(5, bits, 1, sample_format=2))
    assert refusal.code == "image_corrupt"
    assert "signed" in refusal.detail


def test_pages_of_a_tiff_of_16_bits_are_as_bright_as_the_picture() -> None:
    page = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    data = pictures.encoded(page, "TIFF", save_all=True, append_images=[page])
    assert [image.getpixel((0, 0)) for image in decode_video(data, LIMITS, 2).frames] == [(128,) * 3] * 2
