"""The record of one transfer from this worker, as the driver keeps it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.sender import Sender
from embferry.protocol.states import KVPoll
from embferry.protocol.validation import MAX_RECEIVERS

from .checksums import Checksums
from .handle import NO_HANDLE, Handle, NoHandle
from .staging import Source


@dataclass(eq=False, slots=True)
class SendRecord:
    """One transfer from this worker. The manager's lock guards it.

    Attributes:
        room: The ``bootstrap_room``.
        machine: The state machine.
        end: What the user holds.
        peers: Session of each receiver to its address on the control plane.
        ended: Sessions of receivers that have ended with an error, also those of the room's last transfer.
        source: The fields that are sent; empty before they are given and after the release.
        checksums: Checksums taken in advance, if any.
        writes: Writes, and copies from device memory, that have been started and have not ended.
        sent_bytes: Bytes written so far, repeated chunks included.
    """

    room: int
    machine: Sender
    end: Handle | NoHandle = field(init=False)
    peers: dict[int, Hashable] = field(default_factory=dict)
    ended: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_RECEIVERS))
    source: Source = field(default_factory=dict)
    checksums: Checksums | None = None
    writes: int = 0
    sent_bytes: int = 0
    failure: EmbeddingTransferError | None = None
    is_broken: bool = False
    kept_until: float = 0.0

    @property
    def error(self) -> EmbeddingTransferError | None:
        """The error with which the transfer has failed, or None."""
        if self.is_broken:
            return self.failure
        return self.machine.error or self.failure

    @property
    def is_released(self) -> bool:
        """Whether the embedding is no longer read."""
        return self.writes == 0 if self.is_broken else self.machine.source_released and self.writes == 0

    def poll(self) -> KVPoll:
        """Returns where the transfer stands."""
        return KVPoll.Failed if self.error is not None else self.machine.poll()

    def history(self) -> list[str]:
        """Returns the last events of the machine, a line each."""
        return self.machine.history.lines()

    def let_go(self) -> None:
        """The manager has forgotten the record: ends references that lead back to it."""
        self.end.let_go()
        self.end = NO_HANDLE

    def release(self) -> None:
        """Drops the references to the embedding."""
        self.source, self.checksums = {}, None
