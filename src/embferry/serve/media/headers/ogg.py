"""Ogg files (RFC 3533): the number of logical streams, for each of which a demuxer keeps buffers."""

from __future__ import annotations

import re

from embferry.serve.media.headers.claims import ClaimError

MAX_STREAMS = 64
_FIRST_PAGE = re.compile(rb"OggS.[\x02\x03\x06\x07]", re.DOTALL)
"""The beginning of the first page of a stream. A demuxer looks for pages at any place, so all places count."""


def check(data: bytes) -> None:
    """Checks the number of streams.

    Raises:
        ClaimError: the file has more than ``MAX_STREAMS``.
    """
    for count, _ in enumerate(_FIRST_PAGE.finditer(data), 1):
        if count > MAX_STREAMS:
            raise ClaimError(f"it has more than {MAX_STREAMS} streams")
