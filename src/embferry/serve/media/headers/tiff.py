"""TIFF pictures (TIFF 6.0, and BigTIFF): the number of pages, without reading what they say."""

from __future__ import annotations

from typing import Literal

from embferry.serve.media.headers.claims import ClaimError

MAX_PAGES = 1000


def pages(data: bytes) -> int:
    """Returns the number of pages, as far as their directories lie in the file and do not lead back.

    Raises:
        ClaimError: there are more than ``MAX_PAGES``.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    is_big = int.from_bytes(data[2:4], order) == 43
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)
    where = 8 if is_big else 4
    seen: set[int] = set()
    while (at := int.from_bytes(data[where : where + offset_bytes], order)) and at not in seen and at < len(data):
        seen.add(at)
        if len(seen) > MAX_PAGES:
            raise ClaimError(f"it has more than {MAX_PAGES:,} pages")
        where = at + count_bytes + entry_bytes * int.from_bytes(data[at : at + count_bytes], order)
    return len(seen)
