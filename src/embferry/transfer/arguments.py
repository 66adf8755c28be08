"""Checks of values from callers: an error at the call, not later in the driver thread."""

from __future__ import annotations

import operator

from embferry.protocol.errors import LocalProtocolError

MAX_ROOM = (1 << 63) - 1


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """Returns ``value`` as an int. Integers of numpy and torch are accepted; booleans and floats are not.

    Raises:
        LocalProtocolError: It is not a whole number within ``[low, high]``.
    """
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            if low <= number <= high:
                return number
    raise LocalProtocolError(f"{name} must be a whole number from {low} to {high}, not {value!r}"[:200])


def room_number(value: object) -> int:
    """Returns a ``bootstrap_room``, 0 to 2**63 - 1.

    Raises:
        LocalProtocolError: It is something else.
    """
    return whole_number("a room", value, 0, MAX_ROOM)
