"""Headers of pictures, as the router checks them without decoding pixels."""

from __future__ import annotations

import io
import struct
from functools import cache
from random import Random

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.headers import png, tiff, webp
from embferry.serve.media.headers.claims import ClaimError
from embferry.serve.media.image import check_image

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Number, Tree, fresh, packed

LIMITS = MediaSettings(max_side=4096, max_pixels=1 << 22)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO", "PPM", "TGA")
ANIMATED = ("PNG", "GIF", "WEBP", "TIFF")


class MediaImages(Target):
    documented = (ServeError, ClaimError)
    inputs = 2500
    bounds = Bounds(calls=8000, calls_per_byte=16, memory=2 << 20)

    def tree(self, chance: Random) -> Tree:
        name = chance.choice(FORMATS)
        return fresh(_parsed(name, is_animation=name in ANIMATED and chance.random() < 0.5))

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        data = b"".join(pieces)
        if data[:8] == png.SIGNATURE:
            shown, _ = png.delays(data)
            assert len(png.reduced(data)) <= len(data), "a picture that grew"
            assert len(png.reduced(data, animated=True)) <= len(data), "an animation that grew"
        elif data[:4] == b"RIFF":
            shown = webp.delays(data)
        else:
            shown = [1.0] * tiff.pages(data) if data[:2] in (b"II", b"MM") else []
        assert min(shown, default=0) >= 0, "a frame that ends before it begins"
        width, height = check_image(data, LIMITS)
        assert min(width, height) >= 1, "a picture without pixels"
        assert max(width, height) <= LIMITS.max_side, "a side above the limit"
        assert width * height <= LIMITS.max_pixels, "more pixels than the limit"


@cache
def _parsed(name: str, is_animation: bool = False) -> list[Tree]:
    """Returns a small picture with the lengths and sizes in it as numbers."""
    file = io.BytesIO()
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("P" if name == "GIF" else "RGB")
    more = {"save_all": True, "append_images": [picture.rotate(180)]} if is_animation else {}
    if name in ("JPEG", "PNG", "WEBP"):
        more["exif"] = _exif()
    picture.save(file, name, **more)
    data = file.getvalue()
    match name:
        case "PNG":
            return [data[:8], *_chunks(data[8:], ">", after_name=False, spare=4)]
        case "JPEG":
            return _segments(data)
        case "WEBP":
            return [
                b"RIFF",
                Number(len(data) - 8, 4, True),
                b"WEBP",
                *_chunks(data[12:], "<", after_name=True, spare=0),
            ]
    words = [Number(word, 2, True) for (word,) in struct.iter_unpack("<H", data[:60])]
    return [*words, data[60:]]


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _chunks(data: bytes, order: str, *, after_name: bool, spare: int) -> list[Tree]:
    """Splits chunks of a length and a name, in either order, a payload, and ``spare`` bytes behind it."""
    found: list[Tree] = []
    at = 0
    while at + 8 <= len(data):
        length = struct.unpack_from(f"{order}I", data, at + 4 * after_name)[0]
        name = data[at : at + 4] if after_name else data[at + 4 : at + 8]
        number = Number(length, 4, order == "<")
        end = at + 8 + length
        body = [Number(byte, 1) for byte in data[at + 8 : min(end, at + 20)]]
        head = [name, number] if after_name else [number, name]
        found.append([*head, body, data[at + 20 : end], data[end : end + spare]])
        at = end + spare + (length % 2 if after_name else 0)
    return found


def _segments(data: bytes) -> list[Tree]:
    """Splits a JPEG into its markers with their lengths, and the rest from the first scan on."""
    found: list[Tree] = [data[:2]]
    at = 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        head = [data[at : at + 2], Number(length, 2)]
        found.append([*head, [Number(byte, 1) for byte in data[at + 4 : at + 12]], data[at + 12 : at + 2 + length]])
        at += 2 + length
    return [*found, data[at:]]
