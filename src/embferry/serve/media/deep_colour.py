"""Pictures of more than 8 bits per channel: their grey as 8 bits, and the pixels that have a transparent colour."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageChops

BITS, SAMPLE_FORMAT = 258, 339
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
"""Tags of TIFF (TIFF 6.0, 8 and 19), and the value of one."""


def is_grey(image: Image.Image) -> bool:
    """Returns whether a picture is grey with 16 or 32 bits as Pillow keeps it, as whole numbers."""
    return image.mode == "I" or image.mode.startswith("I;16")


def grey(image: Image.Image) -> Image.Image:
    """Converts a grey picture of 12, 16 or 32 bits to 8 bits, black as 0.

    Args:
        image: as Pillow has opened it: a TIFF says how many bits are used, and whether 0 is white.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = int(tags.get(BITS, (16,))[0])
    is_inverted = bool(tags) and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    whole = image.convert("I")
    if bits == 32:  # Pillow takes the upper half for negative numbers
        turned = whole.point(lambda value: value * (1 / (1 << 24)) + 128).convert("L")
        return turned.point([(value + 128) % 256 for value in range(256)])
    return whole.point(_scale(bits, is_inverted), "L")


def pixels_of(image: Image.Image, value: int) -> Image.Image:
    """Returns the mask of the pixels of a grey picture that have a value: 255 there, and else 0."""
    return image.convert("I").point([255 * (number == value) for number in range(1 << 16)], "L")


def pixels_of_png(data: bytes, upper: Image.Image, colour: Sequence[int]) -> Image.Image | None:
    """Returns the mask of the pixels of a PNG that have a colour of 16 bits per channel; None: there are none.

    Args:
        data: the file, which is RGB with 16 bits per channel.
        upper: the decoded picture: the upper 8 bits of each channel.
        colour: red, green and blue.
    """
    mask = _equal(upper, [value >> 8 for value in colour])
    if mask.getbbox() is None:
        return None
    with Image.open(io.BytesIO(data), formats=["PNG"]) as lower:
        # Pillow keeps one byte of two. Read as if the lower byte came first, it keeps the other one.
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        lower.load()
        return ImageChops.darker(mask, _equal(lower, [value & 255 for value in colour]))


def _equal(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    masks = (
        image.getchannel(channel).point([255 * (number == value) for number in range(256)])
        for channel, value in enumerate(colour)
    )
    return functools.reduce(ImageChops.darker, masks)


@functools.cache
def _scale(bits: int, is_inverted: bool) -> list[int]:
    """Returns the 8 bits for each number of ``bits`` bits; larger ones are white."""
    most = (1 << bits) - 1
    scaled = [(min(number, most) * 255 + most // 2) // most for number in range(1 << 16)]
    return [255 - value for value in scaled] if is_inverted else scaled
