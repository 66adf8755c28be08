"""Calls of foreign code, whose exceptions are returned, and the transfer errors that these become."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import ParamSpec

from embferry.protocol.errors import CapacityError, EmbeddingTransferError, LocalProtocolError, TransportError, shown
from embferry.transports.net.loop import is_ctrl_c

log = logging.getLogger(__name__)

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


def error_of_bug(error: Exception, room: int, history: list[str]) -> EmbeddingTransferError:
    """Logs a bug of ours, with the last events of the transfer that it has ended, and returns that transfer's error."""
    text = "room %d: a bug in embferry has ended this transfer; please report it, with this: %s, history %s"
    log.critical(text, room, shown(error), "; ".join(history), exc_info=error, extra={"room": room})
    if is_exhausted(error):
        return as_transfer_error("the driver of the transfer", error, room)
    why = f"a bug in embferry has ended this transfer: {shown(error)}; the log has its traceback"
    return LocalProtocolError(why, room=room)


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
