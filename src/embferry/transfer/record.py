"""The part of a record that the base of both managers needs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from embferry.protocol.errors import EmbeddingTransferError

from .handle import Handle, NoHandle


class Record(Hashable, Protocol):
    """One transfer, as the driver sees it.

    Attributes:
        room: The ``bootstrap_room``.
        end: What the user holds.
        failure: The error of something around the machine that ended the transfer, or None.
        is_broken: Whether the machine has raised: a bug of ours. It is not called again.
        kept_until: When a broken record is forgotten; 0: not known yet.
    """

    room: int
    end: Handle | NoHandle
    failure: EmbeddingTransferError | None
    is_broken: bool
    kept_until: float

    def let_go(self) -> None:
        """The manager has forgotten the record: ends references that lead back to it."""
        ...

    def history(self) -> list[str]:
        """Returns the last events of the machine, a line each."""
        ...
