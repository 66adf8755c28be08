"""JPEG pictures: the number of scans (ITU-T T.81, B.2). A decoder passes over the whole picture in each."""

from __future__ import annotations

import re

from embferry.serve.media.headers.claims import ClaimError

MAX_SCANS = 100
"""Scans of a picture. Encoders make about ten."""
MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""A marker, not an escaped 0xFF of the entropy-coded data, nor one that restarts it."""
_END, _SCAN = 0xD9, 0xDA
_ALONE = frozenset((0x01, 0xD8))
"""Markers without a segment."""


def check(data: bytes) -> None:
    """Checks the number of scans of the first picture of a file.

    Raises:
        ClaimError: there are more than ``MAX_SCANS``, or more than ``MAX_SEGMENTS`` segments.
    """
    scans, at = 0, 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END:
            return
        at = found.end()
        if found[1][0] in _ALONE:
            continue
        if found[1][0] == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ClaimError(f"it has more than {MAX_SCANS} scans")
        at += max(2, int.from_bytes(data[at : at + 2]))
    raise ClaimError(f"it has more than {MAX_SEGMENTS:,} segments")
