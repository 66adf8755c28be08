"""A bound on the values of a JSON text, checked before it is parsed.

A parser makes an object of each value: 60 MB of ``[[],[],…]`` take gigabytes, and seconds during which no other thread
runs. The number of values is counted first, on the bytes. The parser itself bounds the depth.
"""

from __future__ import annotations

import re

from embferry.serve.errors import ServeError

MAX_VALUES = 250_000
"""Values of a JSON text: members of objects and elements of lists, at all levels."""
_PIECE = 1 << 20
_STARTS = b",[{"
_STRING_OR_START = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)


def check_values(body: bytes) -> None:
    """Raises ServeError invalid_json if a JSON text has more than ``MAX_VALUES`` values. Other threads run meanwhile.

    A comma or a bracket stands before each value but the outermost. Few of them need no second look; strings,
    which may hold any number of them, are left out of the exact count.
    """
    if not _is_below(body) and _exact(body) > MAX_VALUES:
        raise ServeError("invalid_json", f"the body has more than {MAX_VALUES:,} values")


def _is_below(body: bytes) -> bool:
    seen = 0
    for at in range(0, len(body), _PIECE):
        piece = body[at : at + _PIECE]
        seen += sum(piece.count(start) for start in _STARTS)
        if seen > MAX_VALUES:
            return False
    return True


def _exact(body: bytes) -> int:
    """Returns the number of values, or a larger one than ``MAX_VALUES`` as soon as it is exceeded."""
    seen = 0
    for found in _STRING_OR_START.finditer(body):
        if body[found.start()] != 0x22:
            seen += 1
            if seen > MAX_VALUES:
                break
    return seen
