"""Standard streams of a command: a full disk, a closed pipe and a closed descriptor end it without a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO

UNWRITTEN, PIPE_CLOSED = 1, 141
"""Exit statuses: the output could not be written; its reader has left, as a shell reports of SIGPIPE."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""Errors of a file or device that takes no more, and of a descriptor that cannot be written to."""
_STDIN, _STDOUT, _STDERR = range(3)


def open_missing() -> None:
    """Opens the descriptors 0 to 2 that the shell has closed (``>&-``).

    Otherwise the next file or connection that the process opens would get such a number, and what is meant for
    standard output would be written into it. Output to what was closed is an error; messages are lost.
    """
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor, os.O_WRONLY if descriptor == _STDERR else os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(_STDOUT, "w", closefd=False)  # noqa: SIM115 - open as long as the process runs
    if sys.stderr is None:
        sys.stderr = open(_STDERR, "w", closefd=False)  # noqa: SIM115 - likewise


@contextlib.contextmanager
def told(who: str) -> Iterator[None]:
    """Ends the process if standard output cannot be written within the context.

    A closed pipe (``… | head``) ends it with status 141, as it does other programs. A full disk or a closed descriptor
    ends it with status 1 and a line on standard error.

    Args:
        who: the program, as the line begins.
    """
    output = sys.stdout
    try:
        with _typers_end(output):
            yield
        output.flush()
    except BrokenPipeError:
        _drop_output()
        sys.exit(PIPE_CLOSED)
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _drop_output()
        with contextlib.suppress(OSError):
            print(f"{who}: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(UNWRITTEN)


@contextlib.contextmanager
def _typers_end(output: TextIO) -> Iterator[None]:
    """Raises BrokenPipeError where typer has ended the process for one: it replaces the stream, and exits with 1."""
    try:
        yield
    except SystemExit as ended:
        if sys.stdout is not output:
            raise BrokenPipeError from ended
        output.flush()
        raise


def _drop_output() -> None:
    """Has nothing more written to standard output: the interpreter flushes it again at exit, which must not fail."""
    _open_null(_STDOUT, os.O_WRONLY)


def _open_null(descriptor: int, flags: int) -> None:
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
