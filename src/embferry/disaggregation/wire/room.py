"""The state that both ends keep of a room."""

from __future__ import annotations

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll

UNKNOWN_LENGTH = -1


class OriginRoom:
    """One end of one transfer.

    Attributes:
        total_tokens: Length of the embedding; -1 while it is not known.
        deadline: When the room fails, in seconds; None while it may wait.
        error: The error with which the room has failed.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.total_tokens = UNKNOWN_LENGTH
        self.status = KVPoll.Bootstrapping
        self.deadline: float | None = None
        self.error: EmbeddingTransferError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing changes any more."""
        return self.status in (KVPoll.Success, KVPoll.Failed)

    def fail(self, error: EmbeddingTransferError) -> None:
        """Ends the room with an error, unless it is over."""
        if not self.over:
            error.room = self.room
            self.status, self.error, self.deadline = KVPoll.Failed, error, None
