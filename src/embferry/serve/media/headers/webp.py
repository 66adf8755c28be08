"""WebP pictures (RFC 9649): the frames of an animation."""

from __future__ import annotations

from embferry.serve.media.headers.claims import ClaimError

MAX_CHUNKS = 100_000
MAX_FRAMES = 10_000


def delays(data: bytes) -> list[float]:
    """Returns the seconds that each frame of an animation is shown; none if the picture is no animation.

    Raises:
        ClaimError: there are more than ``MAX_FRAMES`` frames or ``MAX_CHUNKS`` chunks.
    """
    if data[12:16] != b"VP8X" or not data[20:21] or not data[20] & 0x02:
        return []
    found: list[float] = []
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return found
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"ANMF":
            if len(found) >= MAX_FRAMES:
                raise ClaimError(f"it has more than {MAX_FRAMES:,} frames")
            found.append(int.from_bytes(data[at + 20 : at + 23], "little") / 1000)
        at += 8 + size + size % 2
    raise ClaimError(f"it has more than {MAX_CHUNKS:,} chunks")
