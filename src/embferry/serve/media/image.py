"""Pictures: the header is checked before a pixel is decoded, and what comes out is RGB, upright, on white."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.size import check_bytes, check_size
from embferry.serve.media.sniff import sniff

# PIL's own guard warns at one size and raises at twice that, for the whole process. Ours is stricter, is a setting, and
# runs on the header of every picture before anything is decoded.
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
# Where the header holds width and height. PIL reads them too, but calls a picture of size 0 "unidentified".
_SIZE_AT = {"PNG": (16, ">II"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """``width`` and ``height`` in pixels, as stored, before turning upright."""

    format: str
    width: int
    height: int


def check_image(data: bytes, limits: MediaSettings) -> ImageHeader:
    """Everything that can be said about a picture without decoding it.

    Raises:
        ServeError: see :func:`decode_image`; all but image_truncated and image_corrupt are always found here.
    """
    image, header = _opened(data, limits)
    image.close()
    return header


def decode_image(data: bytes, limits: MediaSettings) -> Image.Image:
    """The picture, mode RGB, turned as its EXIF orientation says; transparent parts on white.

    Raises:
        ServeError: media_too_large, media_empty, unsupported_media_type, wrong_media_kind, media_zero_size,
            media_side_too_long, media_aspect_ratio, media_too_many_pixels, image_animated, image_truncated,
            image_corrupt.
    """
    image, _ = _opened(data, limits)
    with image:
        try:
            image.load()
            upright = image
            for turn in _UPRIGHT.get(_orientation(image), ()):
                upright = upright.transpose(turn)
            return _rgb(upright)
        except Exception as error:  # PIL's decoders raise what they like on bad bytes
            raise _broken(error) from error


def _opened(data: bytes, limits: MediaSettings) -> tuple[Image.Image, ImageHeader]:
    check_bytes(data, limits)
    form = sniff(data, "image")
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
        # A JPEG with several pictures in it (MPO: most phones write them) is one picture and its variants.
        if form.reader != "JPEG" and getattr(image, "is_animated", False):
            raise ServeError(
                "image_animated", f"the {form.name} has several frames; send one of them, or all as a video"
            )
    except ServeError:
        image.close()
        raise
    except Exception as error:  # is_animated decodes: as above
        image.close()
        raise _broken(error) from error
    return image, ImageHeader(form.name, image.width, image.height)


def _orientation(image: Image.Image) -> int:
    """1 (upright) when the EXIF block is damaged: viewers show such a picture as it is stored."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB. 16 bits a channel become 8; transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        raise ServeError(
            "image_corrupt", "pictures of floating point numbers have no range of colours; convert it first"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _broken(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return ServeError("image_truncated", "the picture ends before its last pixel; was it cut off on the way?")
    if "cannot identify" in text:
        text = "its header makes no sense"
    return ServeError("image_corrupt", f"the picture cannot be decoded: {text or type(error).__name__}")
