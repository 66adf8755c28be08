"""Lines that libraries and other programs write themselves, made into lines of the log."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
import threading
from collections.abc import Callable

MAX_LINE_BYTES = 8192
"""Bytes of a line; a longer one is told in several."""
PIPE_BYTES = 1 << 20
END_SECONDS = 0.5
"""A child that lives on may hold the pipe open."""
F_SETPIPE_SZ = 1031
"""``fcntl.F_SETPIPE_SZ`` of Linux, which not every build of Python names."""
_LEVEL = re.compile(r"(?:^|[\s\[(|])(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def read_lines(fd: int, use: Callable[[str], None], name: str) -> threading.Thread:
    """Starts a thread that calls ``use`` with each line that can be read, until the end. It closes the descriptor."""

    def run() -> None:
        rest = b""
        with os.fdopen(fd, "rb", buffering=0) as source:
            while data := source.read(1 << 16):
                *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    _use(line, use)
                if len(rest) > MAX_LINE_BYTES:
                    _use(rest, use)
                    rest = b""
        _use(rest, use)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def _use(line: bytes, use: Callable[[str], None]) -> None:
    for at in range(0, len(line), MAX_LINE_BYTES):
        text = _COLOUR.sub("", line[at : at + MAX_LINE_BYTES].decode("utf-8", "replace")).rstrip()
        if text:
            use(text)


def level_of(line: str) -> int:
    """Returns the level that a line of another program names in its first words; INFO if it names none."""
    found = _LEVEL.search(line[:80])
    return logging.getLevelNamesMapping()[found[1]] if found else logging.INFO


class Capture:
    """Makes lines of all that this process and its children write to some descriptors from now on.

    A write never blocks: code that holds the interpreter's lock, as libraries in C may, would wait for a thread that
    needs the lock to read. What does not fit into the pipe is lost instead.

    Args:
        fds: usually those of standard output and standard error.
        use: called with each line, on a thread of its own.

    Attributes:
        kept: a new descriptor for the place that the last of ``fds`` led to, for the log itself.
    """

    def __init__(self, fds: tuple[int, ...], use: Callable[[str], None]) -> None:
        self._fds = fds
        self.kept = os.dup(fds[-1])
        reader, writer = os.pipe()
        with contextlib.suppress(OSError):  # the system's bound for this user
            fcntl.fcntl(writer, F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(writer, False)
        for fd in fds:
            os.dup2(writer, fd)
        os.close(writer)
        self._reading = read_lines(reader, use, "embferry-stderr")

    def end(self) -> None:
        """Lets the descriptors lead to the log again, and waits for the last lines, for ``END_SECONDS`` at most."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        for fd in self._fds:
            os.dup2(self.kept, fd)
        self._reading.join(END_SECONDS)
