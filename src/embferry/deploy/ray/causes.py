"""Why Ray Serve could not start a replica, out of what it tells of a deployment."""

from __future__ import annotations

import re

_OWN_CLASS = re.compile(r"embferry(\.\w+)+: ")
_REPLICA = re.compile(r"(encode|language)-\w+ cannot start: ")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = "Error:\n"
"""The text in Serve's messages before the traceback of a constructor."""


def cause(message: str) -> str:
    """Returns what a message of Serve says in plain words: without the traceback, if there is one.

    The name of this project's own errors and that of the replica are left out, so that all replicas with the same cause
    have the same text.
    """
    _, error, traceback = _COLOUR.sub("", message).partition(_ERROR)
    if not error:
        return " ".join(message.split())
    lines = traceback.rstrip().splitlines()
    indented = [number for number, line in enumerate(lines) if line[:1].isspace()]
    text = " ".join(lines[indented[-1] + 1 if indented else 0 :])
    return _REPLICA.sub("", _OWN_CLASS.sub("", text, count=1), count=1).strip()


def has_failed(message: str) -> bool:
    """Returns whether a message of Serve tells that a constructor has failed."""
    return _ERROR in message
