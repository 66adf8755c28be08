"""Calls of foreign code, whose exceptions are returned, and the transfer errors that these become."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import ParamSpec

from embferry.protocol.errors import CapacityError, EmbeddingTransferError, LocalProtocolError, TransportError, shown
from embferry.transports.net.loop import is_ctrl_c

P = ParamSpec("P")

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC}


def attempt(call: Callable[P, object], *arguments: P.args, **keywords: P.kwargs) -> Exception | None:
    """Makes a call that may raise anything. Returns the exception, or None.

    Raises:
        KeyboardInterrupt: The call has raised it on the main thread, where it is the user's Ctrl-C.
    """
    try:
        call(*arguments, **keywords)
    except Exception as error:  # noqa: BLE001  (the one place that catches all that foreign code raises)
        return error
    except BaseException as error:  # asyncio.CancelledError, SystemExit: they end no thread of ours
        if is_ctrl_c(error):
            raise
        stray = RuntimeError(shown(error))
        stray.__cause__ = error
        return stray
    return None


def is_exhausted(error: BaseException) -> bool:
    """Returns whether an error says that memory, descriptors or disk space are used up."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _EXHAUSTED)


def as_transfer_error(what: str, error: BaseException, room: int | None = None) -> EmbeddingTransferError:
    """Returns the error of a transfer that was ended by an exception.

    Args:
        what: What was called, as the subject of a sentence: "the sink's deliver()".
        error: The exception. An :class:`EmbeddingTransferError` is kept as it is.
        room: The ``bootstrap_room``.
    """
    if isinstance(error, EmbeddingTransferError):
        return error.with_traceback(None)  # which would keep what its frames refer to as long as the error is kept
    if is_exhausted(error):
        return CapacityError(
            f"{what} found no memory or descriptors: {shown(error)}; raise the limit or ask later", room=room
        )
    if isinstance(error, OSError):
        return TransportError(f"{what} failed: {shown(error)}", room=room, retryable=False)
    return LocalProtocolError(f"{what} raised {shown(error)}; the log has its traceback", room=room)
