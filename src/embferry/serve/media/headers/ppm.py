"""PPM, PGM and PBM pictures (netpbm): without their comments, for each of which a decoder copies what follows."""

from __future__ import annotations

import re

from embferry.serve.media.headers.claims import ClaimError

_COMMENT = re.compile(rb"#[^\r\n]*+")
_BLANKS = rb"(?:\s|#[^\r\n]*+)++"
_HEADER = re.compile(rb"P(?:4|[56]%b\d++)%b\d++%b\d++" % (_BLANKS, _BLANKS, _BLANKS))
"""The header of a picture in binary: width, height and, unless it is black and white, the largest number."""
_PLAIN = (b"P1", b"P2", b"P3")


def without_comments(data: bytes) -> bytes:
    """Returns the picture without comments, which may stand in the header, and anywhere if its pixels are text.

    Raises:
        ClaimError: the header is invalid.
    """
    if data.startswith(_PLAIN):
        return _COMMENT.sub(b"", data)
    header = _HEADER.match(data)
    if header is None:
        raise ClaimError("its header is invalid")
    return _COMMENT.sub(b"", header[0]) + data[header.end() :]
