"""What a sender answers: ``[room, status]``, pushed to the receiver's host and port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

from . import fields

NO_RANK = -1
"""What a sender that has no rank writes as its rank."""
MAX_RANK = 65535


@dataclass(frozen=True, slots=True)
class EmbeddingStatus:
    """The status of a room. Some versions of the origin add the rank of the sender; -1: it has none."""

    room: int
    status: KVPoll
    sender_rank: int | None = None


def read_status(frames: Sequence[bytes]) -> EmbeddingStatus:
    """A status from frames that anybody may have sent, with or without ``sender_rank``.

    :raises RemoteProtocolError: another number of frames, not numbers, or no such status; ``room`` is set when the
        room could be read.
    """
    if len(frames) not in (2, 3):
        raise RemoteProtocolError(f"a status of {len(frames)} frames; it must have 2, or 3 with the sender's rank")
    room = fields.number(frames[0], "the room", 0, fields.MAX_ROOM)
    try:
        status = KVPoll(fields.number(frames[1], "the status", min(KVPoll), max(KVPoll)))
        return EmbeddingStatus(room, status, _rank(frames[2]) if len(frames) == 3 else None)
    except RemoteProtocolError as error:
        error.room = room
        raise


def write_status(message: EmbeddingStatus) -> list[bytes]:
    """Two frames; a third only when ``sender_rank`` is set, for the versions that cannot do without.

    :raises LocalProtocolError: the peer would have to refuse it.
    """
    numbers = [message.room, int(message.status)]
    if message.sender_rank is not None:
        numbers.append(message.sender_rank)
    frames = [str(value).encode("ascii") for value in numbers]
    try:
        read_status(frames)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"a status that no peer can take: {error}") from None
    return frames


def _rank(frame: bytes) -> int:
    if frame == str(NO_RANK).encode("ascii"):
        return NO_RANK
    return fields.number(frame, "the sender's rank", 0, MAX_RANK)
