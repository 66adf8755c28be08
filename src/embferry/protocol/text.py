"""Foreign text in errors, answers and log lines: cut, on one line, without control characters."""

from __future__ import annotations

import re
import reprlib

MAX_SHOWN = 500
"""Characters of a foreign object in the text of an error."""
MAX_DETAIL = 2000
"""Characters of the text of an error."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, separators of lines, marks that turn the direction of a text, and halves of surrogate pairs."""


def printable(text: str, most: int = MAX_DETAIL) -> str:
    """Returns at most ``most`` characters of a text, with control characters as escapes: one line always."""
    if len(text) > most:
        text = text[:most] + "…"
    return _CONTROL.sub(_escape, text)


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """Returns ``repr(value)``, cut, in a time that depends on ``most`` and not on the size of the value.

    Never raises: the ``__repr__`` of an exception or a value is foreign code.
    """
    try:
        if isinstance(value, str | bytes):
            text = repr(value[: most + 1])
        else:
            text = _bounded(most).repr(value) if isinstance(value, _SIZED) else repr(value)
    except BaseException:  # noqa: BLE001  (nothing that it raises may hide what the text is about)
        return f"{type(value).__name__}(…), which has no repr()"
    return printable(text, most)


_SIZED = (list, tuple, dict, set, frozenset)


def _bounded(most: int) -> reprlib.Repr:
    """Returns a ``repr`` that reads a few of the elements of a container."""
    bounded = reprlib.Repr()
    bounded.maxstring = bounded.maxother = most
    bounded.maxlist = bounded.maxtuple = bounded.maxdict = bounded.maxset = bounded.maxfrozenset = 16
    return bounded


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0]) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )
