"""ICO files: the largest of their pictures, so that a decoder can choose no other, and the size in its own header."""

from __future__ import annotations

import struct

from embferry.serve.media.headers import png
from embferry.serve.media.headers.claims import ClaimError

_ENTRY = struct.Struct("<BBBBHHII")
"""Width, height, colours, reserved, planes, bits, bytes, offset."""
_HEAD = struct.pack("<HHH", 0, 1, 1)


def largest(data: bytes) -> tuple[bytes, bool, tuple[int, int]]:
    """Returns the largest picture: a PNG, or an ICO that holds only it; whether it is a PNG; width and height.

    Raises:
        ClaimError: there is no picture, or it reaches beyond the file.
    """
    count = int.from_bytes(data[4:6], "little")
    listed = data[6 : 6 + count * _ENTRY.size]
    entries = list(_ENTRY.iter_unpack(listed[: len(listed) // _ENTRY.size * _ENTRY.size]))
    if not entries:
        raise ClaimError("it lists no picture", truncated=True)
    best = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), entry[5]))
    size, at = best[6:]
    body = data[at : at + size]
    if len(body) < min(size, 40) or size < 40:
        raise ClaimError("its largest picture reaches beyond the file", truncated=True)
    if body[:8] == png.SIGNATURE:
        return body, True, (int.from_bytes(body[16:20]), int.from_bytes(body[20:24]))
    width, height = struct.unpack_from("<ii", body, 4)
    offset = len(_HEAD) + _ENTRY.size
    return _HEAD + _ENTRY.pack(*best[:6], len(body), offset) + body, False, (width, abs(height) // 2)
