"""Animated PNG and WebP, and TIFF of several pages, as videos. Pillow decodes them, one frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.apng import composed
from embferry.serve.media.checks import check_size
from embferry.serve.media.film import LISTED_FPS, Film, too_long
from embferry.serve.media.formats import sniff, still_picture
from embferry.serve.media.headers import png, tiff, webp
from embferry.serve.media.headers.claims import ClaimError
from embferry.serve.media.image import as_rgb, broken_image, check_image, check_strips, open_image

_SHORTEST, _IF_SHORTER = 0.011, 0.1
"""Seconds: a frame that is to be shown for less is shown for the second time, as in browsers."""


def read_animation(data: bytes, limits: MediaSettings) -> Film:
    """Reads the times of the frames, and decodes none.

    Raises:
        ServeError: those of ``check_image``; wrong_media_kind, video_too_long, video_corrupt.
    """
    form = sniff(data, "video").name
    try:
        width, height = check_image(data, limits)
    except ServeError as error:
        raise _of_video(error) from error
    try:
        delays, first = _delays(data, form)
    except ClaimError as error:
        raise ServeError("video_corrupt", f"the {form} video is refused: {error}") from error
    if not delays:
        raise still_picture(form)
    shown = [delay if delay >= _SHORTEST else _IF_SHORTER for delay in delays]
    starts = [0.0, *accumulate(shown)]
    if starts[-1] > limits.max_video_seconds:
        raise too_long(starts[-1], limits)
    return Film(form, first, width, height, starts[:-1], starts[-1], False)


def _delays(data: bytes, form: str) -> tuple[list[float], int]:
    """Returns the seconds that each frame is shown, and the number that Pillow gives the first."""
    if form == "TIFF":
        count = tiff.pages(data)
        return ([1 / LISTED_FPS] * count if count > 1 else []), 0
    if form == "WebP":
        return webp.delays(data), 0
    delays, is_apart = png.delays(data)
    return delays, int(is_apart)


def animated(data: bytes, film: Film, limits: MediaSettings) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """Yields the start of each frame, and a function that returns its picture and must be called before the next."""
    try:
        yield from _frames(data, film, limits)
    except ServeError as error:
        raise _of_video(error) from error


def _frames(data: bytes, film: Film, limits: MediaSettings) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    form = film.form
    if form == "PNG":
        yield from composed(png.reduced(data, animated=True), film, limits)
        return
    with open_image(data, limits) as image:
        for number, start in enumerate(film.starts, film.stream):
            try:
                image.seek(number)
            except Exception as error:  # as in image.decode_image
                raise broken_image(error) from error
            check_size(image.width, image.height, limits)
            if form == "TIFF":
                check_strips(image, data, limits)
            yield start, partial(_picture, image)


def _picture(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return as_rgb(image)
    except Exception as error:  # as in image.decode_image
        raise _of_video(broken_image(error)) from error


def _of_video(refusal: ServeError) -> ServeError:
    codes = {"image_truncated": "video_truncated", "image_corrupt": "video_corrupt"}
    return ServeError(codes[refusal.code], refusal.detail) if refusal.code in codes else refusal
