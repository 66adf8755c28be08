"""Messages of a sender: ``[room, status]``, pushed to the receiver's host and port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

from .requests import MAX_ROOM, number

NO_RANK = -1
MAX_RANK = 65535


@dataclass(frozen=True, slots=True)
class EmbeddingStatus:
    """The status of a room."""

    room: int
    status: KVPoll
    sender_rank: int | None = None
    """Rank of the sender, or -1, if the message had a third frame. Only a later development branch of the origin sends
    one. It is read and never written."""


def read_status(frames: Sequence[bytes]) -> EmbeddingStatus:
    """Reads a status of two or three frames from any peer.

    Raises:
        RemoteProtocolError: The number of frames or a frame is wrong. ``room`` is set if the room could be read.
    """
    if len(frames) not in (2, 3):
        raise RemoteProtocolError(f"a status of {len(frames)} frames; it must have 2, or 3 with the sender's rank")
    room = number(frames[0], "the room", 0, MAX_ROOM)
    try:
        status = KVPoll(number(frames[1], "the status", min(KVPoll), max(KVPoll)))
        rank = None
        if len(frames) == 3:
            rank = NO_RANK if frames[2] == b"-1" else number(frames[2], "the sender's rank", 0, MAX_RANK)
        return EmbeddingStatus(room, status, rank)
    except RemoteProtocolError as error:
        error.room = room
        raise


def write_status(message: EmbeddingStatus) -> list[bytes]:
    """Returns the two frames of a status.

    There are always two: the origin's receivers unpack exactly two, and a third one ends their only status thread.

    Raises:
        LocalProtocolError: A peer would refuse the message.
    """
    frames = [str(value).encode("ascii") for value in (message.room, int(message.status))]
    try:
        read_status(frames)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"every peer would refuse this status: {error}") from None
    return frames
