"""Pictures: checks the header before it decodes pixels, and returns RGB, upright, on a white background."""

from __future__ import annotations

import io
import struct

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.checks import check_bytes, check_size, exhausted, sniff
from embferry.serve.media.headers import jpeg
from embferry.serve.media.headers.claims import ClaimError
from embferry.transfer.failures import is_exhausted

# PIL's own limit holds for the whole process: it warns at one size and raises at twice that. Ours is stricter, is a
# setting, and is checked in the header of every picture.
Image.MAX_IMAGE_PIXELS = None

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
# Place of width and height in the header. PIL reads them too, but reports a picture of size 0 as unidentified.
_SIZE_AT = {"PNG": (16, ">II"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}


def check_image(data: bytes, limits: MediaSettings) -> tuple[int, int]:
    """Checks a picture without decoding its pixels.

    Returns:
        Width and height in pixels, as stored, before the EXIF orientation is applied.

    Raises:
        ServeError: see :func:`decode_image`. Some image_truncated and image_corrupt are found only there.
    """
    with _opened(data, limits) as image:
        return image.size


def decode_image(data: bytes, limits: MediaSettings) -> Image.Image:
    """Decodes a picture to mode RGB, with its EXIF orientation applied and transparent parts on white.

    Raises:
        ServeError: media_too_large, media_empty, unsupported_media_type, wrong_media_kind, media_zero_size,
            media_side_too_long, media_aspect_ratio, media_too_many_pixels, image_animated, image_truncated,
            image_corrupt.
    """
    with _opened(data, limits) as image:
        try:
            image.load()
            upright = image
            for turn in _UPRIGHT.get(_orientation(image), ()):
                upright = upright.transpose(turn)
            return _rgb(upright)
        except Exception as error:  # PIL's decoders raise many types on bad bytes
            raise _broken(error) from error


def _opened(data: bytes, limits: MediaSettings) -> Image.Image:
    check_bytes(data, limits)
    form = sniff(data, "image")
    if form.reader == "JPEG":
        try:
            jpeg.check(data, limits.max_pixels)
        except ClaimError as error:
            raise ServeError("image_corrupt", f"the JPEG picture is refused: {error}") from error
    if form.reader in _SIZE_AT:
        at, layout = _SIZE_AT[form.reader]
        if len(data) < at + struct.calcsize(layout):
            raise ServeError("image_truncated", f"the {form.name} picture ends in its header")
        width, height = struct.unpack_from(layout, data, at)
        check_size(width, abs(height), limits)  # a BMP of negative height is stored top down
    try:
        image = Image.open(io.BytesIO(data), formats=[form.reader])
    except Exception as error:  # as in decode_image
        raise _broken(error) from error
    try:
        check_size(image.width, image.height, limits)
        # A JPEG file with several pictures (MPO, which most phones write) is one picture and its variants.
        if form.reader != "JPEG" and getattr(image, "is_animated", False):
            why = f"the {form.name} picture has several frames; send it as a video, or send one frame"
            raise ServeError("image_animated", why)
    except Exception as error:  # is_animated decodes: as above
        image.close()
        raise _broken(error) from error
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if the EXIF block is damaged, as viewers do."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: 16 bits per channel become 8, transparent parts become white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        raise ServeError("image_corrupt", "floating-point pictures have no defined colour range; convert it first")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _broken(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if is_exhausted(error):
        return exhausted("picture", error)
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return ServeError("image_truncated", "the picture ends before its last pixel; send the complete file")
    if "cannot identify" in text:
        text = "its header is invalid"
    return ServeError("image_corrupt", f"the picture cannot be decoded: {text or type(error).__name__}")
