"""Checks of what a caller passes, made at the call: a wrong value fails there, not later in a driver's thread."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from .errors import EmbeddingTransferError, LocalProtocolError, shown
from .layout import MAX_NAME
from .messages import MAX_HANDLE, TransportAddress, sendable


def as_integer(name: str, value: object, low: int, high: int, *, room: int | None = None) -> int:
    """Returns ``value`` as an int. Integers of numpy are integers; floats, bools and strings are not.

    Raises:
        LocalProtocolError: It is no integer, or not in ``[low, high]``.
    """
    number: int | None = None
    if type(value) is int:
        number = value
    elif not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]  # otherwise a TypeError
    if number is None:
        raise LocalProtocolError(f"{name} must be an integer, not {_shown(value)}", room=room)
    if not low <= number <= high:
        raise LocalProtocolError(f"{name} must be an integer from {low} to {high}, not {number}", room=room)
    return number


def as_integers(name: str, values: Iterable[object], low: int, high: int, *, room: int) -> tuple[int, ...]:
    """Returns ``values`` as a tuple of ints.

    Raises:
        LocalProtocolError: There is something else among them, or one of them is not in ``[low, high]``.
    """
    try:
        found: tuple[Any, ...] = tuple(values)
    except TypeError:
        raise LocalProtocolError(f"{name} must be a sequence of integers, not {_shown(values)}", room=room) from None
    if not found or (set(map(type, found)) == {int} and low <= min(found) and max(found) <= high):
        return found  # the common case, of up to thousands of blocks
    return tuple(as_integer(f"{name}[{at}]", value, low, high, room=room) for at, value in enumerate(found))


def as_seconds(name: str, value: object, above: float = 0.0, *, room: int | None = None) -> float:
    """Returns ``value`` as a float.

    Raises:
        LocalProtocolError: It is no number, or not greater than ``above``.
    """
    seconds = math.nan
    if type(value) is float:
        seconds = value
    elif hasattr(value, "__float__") and not isinstance(value, bool):  # SupportsFloat takes 20 microseconds
        with suppress(TypeError, ValueError, OverflowError):  # an array, or more than a float can be
            seconds = float(value)
    if not seconds > above:
        bound = f" above {above:g}" if above > -math.inf else ""
        raise LocalProtocolError(f"{name} must be a number of seconds{bound}, not {_shown(value)}", room=room)
    return seconds


def as_bytes(name: str, value: object, shortest: int, longest: int, *, room: int | None = None) -> bytes:
    """Returns ``value``.

    Raises:
        LocalProtocolError: It is not of type bytes, or not of such a length.
    """
    if not isinstance(value, bytes):
        raise LocalProtocolError(f"{name} must be bytes, not {_shown(value)}", room=room)
    if not shortest <= len(value) <= longest:
        raise LocalProtocolError(f"{name} has {len(value)} bytes; it must have {shortest} to {longest}", room=room)
    return value


def as_text(name: str, value: object, longest: int, *, room: int | None = None) -> str:
    """Returns ``value`` as it can be sent: see :func:`~.messages.sendable`.

    Raises:
        LocalProtocolError: It is not a str, or empty.
    """
    if not isinstance(value, str) or not value:
        raise LocalProtocolError(f"{name} must be a str that is not empty, not {_shown(value)}", room=room)
    return sendable(value, longest)


def as_error(value: object, *, room: int | None = None) -> EmbeddingTransferError:
    """Returns ``value``, the error with which a caller ends a transfer.

    Raises:
        LocalProtocolError: It is no EmbeddingTransferError, so it has no code that the peer could be told.
    """
    if not isinstance(value, EmbeddingTransferError):
        raise LocalProtocolError(f"error must be an EmbeddingTransferError, not {_shown(value)}", room=room)
    return value


def as_addresses(addresses: Iterable[TransportAddress], most: int) -> tuple[TransportAddress, ...]:
    """Returns the transports of one end.

    Raises:
        LocalProtocolError: They are too many, or a name or a handle cannot be sent.
    """
    found = tuple(addresses)
    if len({address.name for address in found}) != len(found) or len(found) > most:
        raise LocalProtocolError(f"up to {most} transports with distinct names, not {[a.name for a in found]}")
    for address in found:
        if as_text("the name of a transport", address.name, MAX_NAME) != address.name:
            raise LocalProtocolError(f"{address.name!r} is no name of a transport: up to {MAX_NAME} characters")
        as_bytes(f"the handle of {address.name}", address.handle, 0, MAX_HANDLE)
    return found


def _shown(value: object) -> str:
    return f"{shown(value, 80)} ({type(value).__name__})"
