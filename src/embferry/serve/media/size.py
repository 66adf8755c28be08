"""Whether width and height can be: one rule for pictures and videos."""

from __future__ import annotations

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError


def check_bytes(data: bytes, limits: MediaSettings) -> None:
    """Raises ServeError media_too_large."""
    if len(data) > limits.max_bytes:
        raise ServeError(
            "media_too_large",
            f"the file has {len(data):,} bytes; at most {limits.max_bytes:,} are taken (media.max_bytes)",
        )


def check_size(width: int, height: int, limits: MediaSettings) -> None:
    """
    Args:
        width, height: pixels, as the header claims: nothing has been decoded yet.

    Raises:
        ServeError: media_zero_size, media_side_too_long, media_aspect_ratio, media_too_many_pixels.
    """
    size = f"{width:,} × {height:,} pixels"
    if min(width, height) < 1:
        raise ServeError("media_zero_size", f"it is {size}; nothing can be seen")
    if max(width, height) > limits.max_side:
        raise ServeError(
            "media_side_too_long", f"it is {size}; a side has at most {limits.max_side:,} (media.max_side)"
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        most = f"{limits.max_aspect_ratio:g} times the other (media.max_aspect_ratio)"
        raise ServeError("media_aspect_ratio", f"it is {size}; one side may be at most {most}")
    if width * height > limits.max_pixels:
        raise ServeError(
            "media_too_many_pixels", f"it is {size}; at most {limits.max_pixels:,} in all are taken (media.max_pixels)"
        )
