"""Pictures: checks the header before it decodes pixels, and returns RGB, upright, on a white background."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from typing import Any

from PIL import AvifImagePlugin, Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import deep_colour
from embferry.serve.media.checks import check_bytes, check_size, exhausted
from embferry.serve.media.formats import sniff
from embferry.serve.media.headers import gif, ico, jpeg, png, ppm
from embferry.serve.media.headers.claims import ClaimError
from embferry.transfer.failures import is_exhausted

# PIL's own limit holds for the whole process: it warns at one size and raises at twice that. Ours is stricter, is a
# setting, and is checked in the header of every picture.
Image.MAX_IMAGE_PIXELS = None
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the process that decodes may not start others

ORIENTATION = 0x0112
"""EXIF tag (CIPA DC-008, 4.6.4)."""
_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
_SIZE_AT = {"PNG": (16, ">II"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}
"""Place of width and height in the header. PIL reads them too, but reports a picture of size 0 as unidentified."""
_OS2_BMP = (18, "<HH")
"""The same of a BMP with the header of OS/2 1.x, which has 12 bytes."""
_SIGNED = 2
"""Numbers of a TIFF that are signed (TIFF 6.0, 19)."""
_BITS_15 = 15
"""Bits of a colour, or of one of the map of colours, of a TGA; PIL knows those of 16, 24 and 32."""
_TAILS = (bytes(16), b"\xaa" * 16, b"\x55" * 16, b"\xfe" * 16)
"""Bytes behind a JPEG without an end. The first two differ in their first bit, as codes of pixels in them do; the
others are for progressive pictures, where few bits may make up the rest of many pixels."""
_BAND = 64
"""Rows that are compared at a time."""
_COMPRESSION, _JPEG_IN_TIFF = 259, (6, 7)
_PIECES = ((273, 279), (324, 325), (513, 514))
"""Tags with offsets and lengths of strips, tiles, and a JPEG picture in the old style (TIFF 6.0: 3, 15, 22)."""


def check_image(data: bytes, limits: MediaSettings) -> tuple[int, int]:
    """Checks a picture without decoding its pixels.

    Returns:
        Width and height in pixels, as stored, before the EXIF orientation is applied.

    Raises:
        ServeError: see :func:`decode_image`. Some image_truncated and image_corrupt are found only there.
    """
    with _opened(*_readable(data, limits), limits) as image:
        return image.size


def decode_image(data: bytes, limits: MediaSettings) -> Image.Image:
    """Decodes a picture to mode RGB, with its EXIF orientation applied and transparent parts on white.

    Raises:
        ServeError: media_too_large, media_empty, unsupported_media_type, wrong_media_kind, media_zero_size,
            media_side_too_long, media_aspect_ratio, media_too_many_pixels, image_truncated, image_corrupt.
    """
    data, reader = _readable(data, limits)
    with _opened(data, reader, limits) as image:
        try:
            upright = _decoded(image, data, reader)
            for turn in _UPRIGHT.get(_orientation(image), ()):
                upright = upright.transpose(turn)
            return upright
        except Exception as error:  # PIL's decoders raise many types on bad bytes
            raise broken_image(error) from error


def _decoded(image: Image.Image, data: bytes, reader: str) -> Image.Image:
    tiles: Any = getattr(image, "tile", None)
    covered = tiles[0].extents if reader == "GIF" and tiles else None
    if reader == "JPEG":
        return as_rgb(_decoded_jpeg(image, data))
    image.load()
    if covered is not None and covered != (0, 0, *image.size):
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(as_rgb(image).crop(covered), covered[:2])
        return rgb
    if reader == "PNG" and image.mode == "RGB" and data[24] == 16 and "transparency" in image.info:
        clear = deep_colour.pixels_of_png(data, image, image.info.pop("transparency"))
        rgb = as_rgb(image)
        if clear is not None:
            rgb.paste("white", mask=clear)
        return rgb
    return as_rgb(image)


def _decoded_jpeg(image: Image.Image, data: bytes) -> Image.Image:
    """Decodes a JPEG, also one that lacks only the marker of its end.

    libjpeg reads some bytes ahead, so it may call such a picture cut off. What it would read there makes no difference
    to the pixels if none of them is missing.
    """
    try:
        image.load()
    except OSError:
        whole = _without_end(data, is_progressive="progressive" in image.info)
        if whole is None:
            raise
        return whole
    return image


def _without_end(data: bytes, *, is_progressive: bool) -> Image.Image | None:
    """Returns the picture of a JPEG without an end; None if pixels are missing too.

    A progressive one is decoded only when its end has been found, so it gets one. Whether all of its scans are there is
    in their headers.
    """
    if is_progressive and not jpeg.has_all_scans(data):
        return None
    tails = [tail + jpeg.END for tail in _TAILS] if is_progressive else _TAILS[:2]
    with contextlib.suppress(OSError, SyntaxError):
        first, *others = tails
        whole = _with_tail(data, first)
        if all(_is_same(whole, _with_tail(data, other)) for other in others):
            return whole
    return None


def _with_tail(data: bytes, tail: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data.rstrip(b"\xff") + tail), formats=["JPEG"]) as image:
        image.load()
        return image


def _is_same(first: Image.Image, second: Image.Image) -> bool:
    width, height = first.size
    boxes = [(0, top, width, min(top + _BAND, height)) for top in range(0, height, _BAND)]
    return all(first.crop(box).tobytes() == second.crop(box).tobytes() for box in boxes)


def _readable(data: bytes, limits: MediaSettings) -> tuple[bytes, str]:
    """Checks a file by its header. Returns what PIL is to read, and PIL's name of its format."""
    check_bytes(data, limits)
    form = sniff(data, "image")
    reader = form.reader
    try:
        if reader == "ICO":
            data, is_png, size = ico.largest(data)
            reader = "PNG" if is_png else "ICO"
            if not is_png:  # that of a PNG is checked below
                check_size(*size, limits)
        if reader == "PNG":
            data = png.reduced(data)
        elif reader == "GIF":
            data = gif.with_screen(data)
        elif reader == "PPM":
            data = ppm.without_comments(data)
        elif reader == "TGA" and _BITS_15 in (data[7], data[16]):
            raise ServeError("unsupported_media_type", "TGA pictures of 15 bits are not read here; send it as a PNG")
        elif reader == "JPEG":
            jpeg.check(data, limits.max_pixels)
    except ClaimError as error:
        code = "image_truncated" if error.truncated else "image_corrupt"
        raise ServeError(code, f"the {form.name} picture is refused: {error}") from error
    _check_claimed_size(data, reader, form.name, limits)
    return data, reader


def _opened(data: bytes, reader: str, limits: MediaSettings) -> Image.Image:
    image = open_image(data, limits, reader)
    if reader == "TIFF":
        try:
            check_strips(image, data, limits)
        except ServeError:
            image.close()
            raise
    return image


def _check_claimed_size(data: bytes, reader: str, name: str, limits: MediaSettings) -> None:
    if reader not in _SIZE_AT:
        return
    at, layout = _OS2_BMP if reader == "BMP" and data[14] == 12 else _SIZE_AT[reader]
    if len(data) < at + struct.calcsize(layout):
        raise ServeError("image_truncated", f"the {name} picture ends in its header")
    width, height = struct.unpack_from(layout, data, at)
    check_size(width, abs(height), limits)  # a BMP of negative height is stored top down


def open_image(data: bytes, limits: MediaSettings, reader: str | None = None) -> Image.Image:
    """Opens a picture whose header was checked. Of one with several frames, PIL's first is shown, as viewers do.

    Args:
        data: the file.
        limits: the settings.
        reader: PIL's name of the format; None: that of the first bytes.

    Raises:
        ServeError: see :func:`decode_image`.
    """
    reader = reader or sniff(data, "image").reader
    if reader == "HEIF":
        _register_heif()
    try:
        image = Image.open(io.BytesIO(data), formats=[reader])
    except Exception as error:  # as in decode_image
        raise broken_image(error) from error
    try:
        check_size(image.width, image.height, limits)
    except ServeError:
        image.close()
        raise
    return image


def check_strips(image: Any, data: bytes, limits: MediaSettings) -> None:
    """Checks the number of scans of the JPEG pictures that the page of a TIFF consists of, if it does.

    Raises:
        ServeError: image_corrupt.
    """
    tags = image.tag_v2
    if tags.get(_COMPRESSION) not in _JPEG_IN_TIFF:
        return
    try:
        places = [place for pair in _PIECES for place in zip(*(_numbers(tags.get(tag)) for tag in pair), strict=False)]
        jpeg.check_pieces(data, places, limits.max_pixels)
    except ClaimError as error:
        raise ServeError("image_corrupt", f"the TIFF picture is refused: {error}") from error


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(number for number in values if isinstance(number, int))


@functools.cache
def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        why = "HEIC is not read here, because pillow-heif is not installed; send the picture as JPEG or PNG"
        raise ServeError("unsupported_media_type", why) from error
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = False
    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if the EXIF block is damaged, as viewers do."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow raises many types on bad bytes
        return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: more than 8 bits per channel become 8, transparent parts become white.

    Args:
        image: as PIL has opened it: a TIFF says what its numbers mean.

    Raises:
        ServeError: image_corrupt.
    """
    if image.mode == "F":
        raise ServeError("image_corrupt", "floating-point pictures have no defined colour range; convert it first")
    if _SIGNED in _numbers(getattr(image, "tag_v2", {}).get(deep_colour.SAMPLE_FORMAT)):
        raise ServeError("image_corrupt", "pictures of signed numbers have no defined colour range; convert it first")
    if deep_colour.is_grey(image):
        rgb = deep_colour.grey(image).convert("RGB")
        if "transparency" in image.info:
            rgb.paste("white", mask=deep_colour.pixels_of(image, image.info["transparency"]))
        return rgb
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def broken_image(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if is_exhausted(error):
        return exhausted("picture", error)
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return ServeError("image_truncated", "the picture ends before its last pixel; send the complete file")
    if "cannot identify" in text:
        text = "its header is invalid"
    elif "Plugin." in text:  # a constant of Pillow, which clients cannot set
        text = "a part of it is too large"
    return ServeError("image_corrupt", f"the picture cannot be decoded: {text or type(error).__name__}")
