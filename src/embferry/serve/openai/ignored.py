"""The fields of a request that have no effect here, for the response's header and the log."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from embferry.protocol.text import printable

HEADER = "Embferry-Ignored-Fields"
MAX_NAMED = 16
"""Fields that are named; the others are counted."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values by which a request asks for nothing."""
MAX_NAME = 60
"""Characters of a name."""


class Ignored:
    """Collects the places of fields, such as ``temprature`` or ``messages[0].content[1].detail``. Bounded."""

    def __init__(self) -> None:
        self._named: dict[str, None] = {}
        self._more = 0

    def add(self, field: str) -> None:
        """Adds a field, unless it is there. Any text will do: it is cut and escaped."""
        name = printable(field, MAX_NAME).encode("ascii", "backslashreplace").decode()[: 2 * MAX_NAME]
        if name in self._named:
            return
        if len(self._named) < MAX_NAMED:
            self._named[name] = None
        else:
            self._more += 1

    def note(self, fields: Mapping[str, Any], read: Collection[str], at: str) -> None:
        """Adds the fields that nothing reads. Empty values change nothing; of ``detail``, neither does "auto".

        Args:
            fields: an object of the request.
            read: the names of the fields that are read.
            at: the object's place in the request.
        """
        for name, value in fields.items():
            if name not in read and value not in EMPTY and (name, value) != ("detail", "auto"):
                self.add(f"{at}.{name}")

    def __bool__(self) -> bool:
        return bool(self._named)

    def __str__(self) -> str:
        """The fields as one line of printable ASCII."""
        more = (f"{self._more} more",) if self._more else ()
        return ", ".join((*self._named, *more))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The header that names the fields; empty if there are none."""
        return [(HEADER.lower().encode(), str(self).encode())] if self else []
