"""Frames of animated PNGs, put together as the format says (W3C PNG, third edition, 11.3.6.2).

Pillow has two faults here. It compares a transparent colour of 16 bits with 8 bits of each pixel. And in a picture
without alpha, it makes the area that a frame clears black instead of transparent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from PIL import Image, ImageChops

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import deep_colour
from embferry.serve.media.film import Film
from embferry.serve.media.headers import png
from embferry.serve.media.headers.claims import ClaimError
from embferry.serve.media.image import as_rgb, broken_image, open_image


def composed(data: bytes, film: Film, limits: MediaSettings) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """Yields what ``animation.animated`` does, of an animated PNG.

    Raises:
        ServeError: video_corrupt, video_truncated, or one of a picture.
    """
    canvas = Image.new("RGBA", (film.width, film.height))
    found = png.frames(data)
    for number, start in enumerate(film.starts):
        try:
            frame = next(found, None)
        except ClaimError as error:
            code = "video_truncated" if error.truncated else "video_corrupt"
            raise ServeError(code, f"the PNG video is refused: {error}") from error
        if frame is None:
            raise ServeError("video_truncated", "the video ends before its last frame; send the complete file")
        layer = _layer(frame.picture, limits)
        box = (frame.left, frame.top, frame.left + layer.width, frame.top + layer.height)
        after = None
        if frame.disposal == png.RESTORE and number:
            after = canvas.crop(box)
        elif frame.disposal in (png.CLEAR, png.RESTORE):
            after = Image.new("RGBA", layer.size)
        if frame.is_over:
            canvas.alpha_composite(layer, (frame.left, frame.top))
        else:
            canvas.paste(layer, box)
        yield start, partial(as_rgb, canvas)
        if after is not None:
            canvas.paste(after, box)


def _layer(data: bytes, limits: MediaSettings) -> Image.Image:
    """Returns a PNG as RGBA with 8 bits per channel."""
    with open_image(data, limits, "PNG") as image:
        try:
            image.load()
            key = image.info.get("transparency")
            clear: Image.Image | None = None
            if deep_colour.is_grey(image):
                layer = deep_colour.grey(image).convert("RGBA")
                clear = None if key is None else deep_colour.pixels_of(image, key)
            elif data[png.DEPTH] == 16 and image.mode == "RGB" and key is not None:
                del image.info["transparency"]
                layer = image.convert("RGBA")
                clear = deep_colour.pixels_of_png(data, image, key)
            else:
                layer = image.convert("RGBA")
            if clear is not None:
                layer.putalpha(ImageChops.invert(clear))
            return layer
        except Exception as error:  # as in image.decode_image
            raise broken_image(error) from error
