"""JPEG pictures: the number of scans (ITU-T T.81, B.2). A decoder passes over the whole picture in each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from embferry.serve.media.headers.claims import ClaimError

MAX_SCANS = 100
"""Scans of a picture. Encoders make about ten, and at most eighteen for four colours."""
MAX_PASSES = 20
"""Scans of a picture of the most pixels that are allowed; a smaller one may have more."""
MAX_SEGMENTS = 10_000
MAX_REPEATS = 4
"""How often the pieces of a picture may take the bytes of the file."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""A marker, not an escaped 0xFF of the entropy-coded data, nor one that restarts it."""
_END, _SCAN = 0xD9, 0xDA
END = bytes((0xFF, _END))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the header of a frame (table B.1), which has height and width."""
_ALONE = frozenset((0x01, 0xD8))
"""Markers without a segment."""


def check(data: bytes, max_pixels: int) -> None:
    """Checks the number of scans of the first picture of a file.

    Args:
        data: the file.
        max_pixels: of a picture. All scans together may pass over ``MAX_PASSES`` times as many.

    Raises:
        ClaimError: there are more scans, or more than ``MAX_SEGMENTS`` segments.
    """
    _passed(data, max_pixels, 0)


def check_pieces(data: bytes, places: Sequence[tuple[int, int]], max_pixels: int) -> None:
    """Does what :func:`check` does for a picture in pieces that are JPEG pictures each, as in TIFF.

    Args:
        data: the file.
        places: offset and length of each piece in it.
        max_pixels: see :func:`check`; of all pieces together.

    Raises:
        ClaimError: see :func:`check`; the pieces take the bytes of the file more than ``MAX_REPEATS`` times.
    """
    if sum(length for _, length in places) > MAX_REPEATS * len(data) or len(places) > len(data):
        raise ClaimError(f"its {len(places):,} pieces have more bytes than the file")
    passed = 0
    for at, length in places:
        passed = _passed(data[at : at + length], max_pixels, passed)


def has_all_scans(data: bytes) -> bool:
    """Returns whether the first picture of a file has scans for all bits of each coefficient (G.1.1)."""
    missing: set[tuple[int, int]] = set()
    is_framed = False
    for marker, at in _segments(data):
        if marker in _FRAMES:
            is_framed = True
            missing = {(name, number) for name in _named(data, at + 7, 3) for number in range(64)}
        elif marker == _SCAN:
            names = _named(data, at + 2, 2)
            spectrum = data[at + 3 + 2 * len(names) : at + 6 + 2 * len(names)]
            if len(spectrum) < 3:
                return False
            if spectrum[2] & 15 == 0:  # of the bits that are left, this scan has the last
                missing -= {(name, number) for name in names for number in range(spectrum[0], spectrum[1] + 1)}
    return is_framed and not missing


def _named(data: bytes, at: int, size: int) -> bytes:
    """Returns the names of the colours that a header lists, with ``size`` bytes for each, behind their number."""
    count = int.from_bytes(data[at : at + 1])
    return data[at + 1 : at + 1 + size * count : size]


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the marker of each segment up to the end of the first picture, and where its length is.

    Raises:
        ClaimError: there are more than ``MAX_SEGMENTS``.
    """
    at = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END:
            return
        at = found.end()
        if found[1][0] not in _ALONE:
            yield found[1][0], at
            at += max(2, int.from_bytes(data[at : at + 2]))
    raise ClaimError(f"it has more than {MAX_SEGMENTS:,} segments")


def _passed(data: bytes, max_pixels: int, before: int) -> int:
    """Returns the pixels that the scans of a picture pass over, added to those ``before``. Raises as :func:`check`."""
    scans = pixels = 0
    for marker, at in _segments(data):
        if marker in _FRAMES:
            height, width = int.from_bytes(data[at + 3 : at + 5]), int.from_bytes(data[at + 5 : at + 7])
            pixels = max(pixels, height * width)
        elif marker == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ClaimError(f"it has more than {MAX_SCANS} scans")
            if before + scans * pixels > MAX_PASSES * max_pixels:
                limit = f"{MAX_PASSES} times {max_pixels:,} (media.max_pixels)"
                raise ClaimError(f"its scans pass over {before + scans * pixels:,} pixels; the limit is {limit}")
    return before + scans * pixels
