"""Checks that pictures and videos share: limits on bytes, width and height."""

from __future__ import annotations

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError


def exhausted(what: str, error: Exception) -> ServeError:
    """Returns the error of a file that could not be decoded for lack of memory or descriptors."""
    why = f"there was no memory or open file left to decode the {what}: {error!r}; try again later"
    return ServeError("capacity_exhausted", why, status=503, retryable=True)


def check_bytes(data: bytes, limits: MediaSettings) -> None:
    """Raises ServeError (media_too_large) for a file above the limit."""
    if len(data) > limits.max_bytes:
        why = f"the file has {len(data):,} bytes; the limit is {limits.max_bytes:,} (media.max_bytes)"
        raise ServeError("media_too_large", why)


def check_size(width: int, height: int, limits: MediaSettings) -> None:
    """Checks width and height, in pixels.

    Raises:
        ServeError: media_zero_size, media_side_too_long, media_aspect_ratio, media_too_many_pixels.
    """
    size = f"{width:,} × {height:,} pixels"
    if min(width, height) < 1:
        raise ServeError("media_zero_size", f"the size is {size}; both sides need at least 1")
    if max(width, height) > limits.max_side:
        limit = f"{limits.max_side:,} (media.max_side)"
        raise ServeError("media_side_too_long", f"the size is {size}; the limit for a side is {limit}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        limit = f"{limits.max_aspect_ratio:g} times the other (media.max_aspect_ratio)"
        raise ServeError("media_aspect_ratio", f"the size is {size}; one side may be at most {limit}")
    if width * height > limits.max_pixels:
        limit = f"{limits.max_pixels:,} in total (media.max_pixels)"
        raise ServeError("media_too_many_pixels", f"the size is {size}; the limit is {limit}")
