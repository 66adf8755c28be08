"""Videos with a display matrix are shown upright, with or without a mirror, as players show them."""

from __future__ import annotations

import io
import math
import struct

import av
import numpy as np
import pytest
from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.media.video import decode_video

WIDTH, HEIGHT = 64, 48
QUARTERS = {(-1, -1): "red", (1, -1): "lime", (-1, 1): "blue", (1, 1): "white"}
"""The colours of a frame, by the direction from its middle: x to the right, y downwards."""
ONE = 1 << 16
EXACT = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
"""a, b, c and d of all matrices that turn by right angles."""


def turned(degrees: float, scale: float = 1.0) -> tuple[int, int, int, int]:
    sin, cos = (round(scale * ONE * turn(math.radians(degrees))) for turn in (math.sin, math.cos))
    return cos, sin, -sin, cos


def quarters() -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for (x, y), colour in QUARTERS.items():
        image.paste(colour, (WIDTH // 4 * (1 + x), HEIGHT // 4 * (1 + y), WIDTH // 4 * (3 + x), HEIGHT // 4 * (3 + y)))
    return image


def film_with(matrix: tuple[int, int, int, int]) -> bytes:
    """Returns an MP4 with these a, b, c and d in the display matrix of its track."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for packet in (*stream.encode(av.VideoFrame.from_image(quarters())), *stream.encode()):
            container.mux(packet)
    data = bytearray(file.getvalue())
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at) == (ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    a, b, c, d = matrix
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


def shown(matrix: tuple[int, int, int, int]) -> tuple[tuple[int, int], dict[tuple[int, int], str]]:
    """Returns the size of the frame, and the colour of each quarter."""
    (frame,) = decode_video(film_with(matrix), MediaSettings(), 2).frames
    found = {}
    for x, y in QUARTERS:
        pixel = frame.getpixel((frame.width // 4 * (2 + x), frame.height // 4 * (2 + y)))
        distances = {
            colour: np.abs(np.subtract(pixel, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).sum()
            for colour in QUARTERS.values()
        }
        found[x, y] = min(distances, key=distances.__getitem__)
    return frame.size, found


def expected(matrix: tuple[int, int, int, int]) -> tuple[tuple[int, int], dict[tuple[int, int], str]]:
    """Moves each quarter to where the matrix says, by its definition (ISO/IEC 14496-12, 6.2.2)."""
    a, b, c, d = matrix
    size = (abs(a * WIDTH + c * HEIGHT), abs(b * WIDTH + d * HEIGHT))
    return size, {(a * x + c * y, b * x + d * y): colour for (x, y), colour in QUARTERS.items()}


@pytest.mark.parametrize("matrix", EXACT)
def test_right_angles_with_and_without_a_mirror(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = (ONE * value for value in matrix)
    assert shown((a, b, c, d)) == expected(matrix)


@pytest.mark.parametrize(
    ("matrix", "nearest"),
    [
        ((0, 0, 0, 0), (1, 0, 0, 1)),
        ((ONE, ONE, ONE, ONE), (1, 0, 0, 1)),
        ((0, -ONE, 0, 0), (1, 0, 0, 1)),
        (turned(10), (1, 0, 0, 1)),
        (turned(80), (0, 1, -1, 0)),
        (turned(185), (-1, 0, 0, -1)),
        (turned(90, 0.25), (0, 1, -1, 0)),
        (turned(270, 3), (0, -1, 1, 0)),
        ((-2 * ONE, 5, -5, ONE), (-1, 0, 0, 1)),
        ((-(1 << 31), 0, 0, -(1 << 31)), (-1, 0, 0, -1)),
    ],
)
def test_other_matrices_are_taken_for_the_nearest_or_for_none(
    matrix: tuple[int, int, int, int], nearest: tuple[int, int, int, int]
) -> None:
    assert shown(matrix) == expected(nearest)
