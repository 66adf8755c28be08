"""The rooms of one sender: a state machine that turns messages, calls and time into commands.

A room goes through rounds. Every destination rank sends an initial request in the first round and a resume in each
later one. A round begins when all ``required_dst_info_num`` ranks have asked, and ends when every write of it is over.
All ranks must request the same range in a round. A message that does not fit is refused with a reason and changes
nothing. No status is reported while a write of its room is in flight, because the receiver frees its blocks when it
hears one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from embferry.protocol.errors import CapacityError, LocalProtocolError, RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .commands import Command, Ended, Refused, Report, WriteBlocks
from .registrations import Registrations
from .requests import EmbeddingArgsRegisterInfo, Generation, OriginWire, TransferEmbeddingInfo, read

MAX_ROOMS = 16384
"""Largest number of live rooms, including those that only a receiver has asked for."""
MAX_ENDED = 16384
"""Number of ended rooms that are remembered, so that late messages do not open them again."""

UNKNOWN_LENGTH = -1


@dataclass(slots=True)
class Room:
    """One transfer to all its destination ranks.

    Attributes:
        room: The ``bootstrap_room``.
        deadline: When the room fails, unless a write is in flight.
        opened: Whether this side has opened the room. If not, only a receiver has asked for it.
        total_tokens: Tokens of the whole embedding, once it is made.
        sent_tokens: Tokens of the rounds that have ended.
        members: Initial request of each session: the destination ranks and their addresses.
        asked: Requests for the round that is about to begin, by session.
        in_flight: Sessions that are being written to.
        round_tokens: Tokens of the current round.
        rounds: Number of rounds that have begun.
        failure: Reason of a failure while writes are still in flight.
    """

    room: int
    deadline: float
    opened: bool = False
    total_tokens: int = UNKNOWN_LENGTH
    sent_tokens: int = 0
    members: dict[str, TransferEmbeddingInfo] = field(default_factory=dict)
    asked: dict[str, TransferEmbeddingInfo] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    round_tokens: int = 0
    rounds: int = 0
    failure: str = ""

    @property
    def complete(self) -> bool:
        """Whether every destination rank has asked in this round."""
        first = next(iter(self.asked.values()), None)
        return first is not None and len(self.asked) == first.required_dst_info_num

    @property
    def status(self) -> KVPoll:
        """Status while the room is live."""
        if self.rounds:
            return KVPoll.Transferring
        return KVPoll.WaitingForInput if self.complete else KVPoll.Bootstrapping


class SenderRooms:
    """The rooms. Calls return the commands to execute, in order. ``now`` is in seconds on a clock that never goes back.

    Args:
        wire: Configuration of the wire, of generation ``BLOCKS``; transfers use no other.
        settings: Time-outs: ``bootstrap_timeout`` until every rank has asked, ``waiting_timeout`` until the embedding
            is made, ``transfer_timeout`` until every rank has asked for the rest. A write has no time-out here,
            because the engine reports the end of every write.
    """

    def __init__(self, wire: OriginWire, settings: TransferSettings | None = None) -> None:
        if wire.generation is not Generation.BLOCKS:
            raise LocalProtocolError(f"transfers use generation blocks, not {wire.generation.value}")
        self.wire = wire
        self.settings = settings or TransferSettings()
        self._rooms: dict[int, Room] = {}
        self._ended: dict[int, KVPoll] = {}
        self._registrations = Registrations(
            lambda: {session for room in self._rooms.values() for session in room.members}
        )

    # Messages of receivers

    def receive(self, frames: Sequence[bytes], now: float) -> list[Command]:
        """Processes one message. A malformed message is refused and raises nothing."""
        try:
            message = read(frames, self.wire)
        except RemoteProtocolError as error:
            return [Refused(error.detail, error.room)]
        if isinstance(message, EmbeddingArgsRegisterInfo):
            return self._registrations.register(message)
        room = self._rooms.get(message.room)
        reason = self._no_resume(message, room) if message.is_resume else self._no_init(message, room)
        if reason:
            return [Refused(reason, message.room, message.mooncake_session_id)]
        if room is None:
            room = self._rooms[message.room] = Room(message.room, now + self.settings.bootstrap_timeout)
        if not message.is_resume:
            room.members[message.mooncake_session_id] = message
        room.asked[message.mooncake_session_id] = message
        return self._begin_round(room, now)

    # Calls of the encode side

    def open(self, room: int, now: float) -> list[Command]:
        """Opens a room that the encode side will serve. Its receiver may have asked for it before.

        Raises:
            LocalProtocolError: The room is open already.
            CapacityError: Too many rooms are open.
        """
        known = self._rooms.get(room)
        if known is not None and known.opened:
            raise LocalProtocolError("the room is open already", room=room)
        if known is None:
            if len(self._rooms) >= MAX_ROOMS:
                raise CapacityError(f"{MAX_ROOMS} rooms are open; end some first", room=room)
            known = self._rooms[room] = Room(room, now)
        self._ended.pop(room, None)
        known.opened = True
        known.deadline = now + (self.settings.waiting_timeout if known.complete else self.settings.bootstrap_timeout)
        return []

    def ready(self, room: int, total_tokens: int, now: float) -> list[Command]:
        """Records that the embedding of ``total_tokens`` tokens is made.

        Raises:
            LocalProtocolError: The room is not open, or its embedding was made before.
        """
        known = self._rooms.get(room)
        if known is None or not known.opened or known.total_tokens != UNKNOWN_LENGTH:
            raise LocalProtocolError("the room is not waiting for its embedding", room=room)
        if total_tokens < 0:
            raise LocalProtocolError(f"an embedding of {total_tokens} tokens", room=room)
        known.total_tokens = total_tokens
        return self._begin_round(known, now)

    def written(self, room: int, session: str, now: float, failure: str = "") -> list[Command]:
        """Records the end of a write; ``failure`` is the reason if not all bytes were written.

        Raises:
            LocalProtocolError: No write to the session was in flight.
        """
        known = self._rooms.get(room)
        if known is None or session not in known.in_flight:
            raise LocalProtocolError(f"no write to {session} is in flight", room=room)
        known.in_flight.remove(session)
        known.failure = known.failure or failure
        return self._end_round(known, now)

    def abort(self, room: int, reason: str) -> list[Command]:
        """Ends the room as soon as no write of it is in flight. Does nothing for a room that is over."""
        known = self._rooms.get(room)
        return [] if known is None else self._fail(known, reason)

    def tick(self, now: float) -> list[Command]:
        """Ends the rooms whose time-out has passed."""
        due = [room for room in self._rooms.values() if not room.in_flight and room.deadline <= now]
        return [command for room in due for command in self._fail(room, _overdue(room))]

    def next_timeout(self) -> float | None:
        """Returns when :meth:`tick` has to be called next; None if it need not be called."""
        return min((room.deadline for room in self._rooms.values() if not room.in_flight), default=None)

    def poll(self, room: int) -> KVPoll | None:
        """Returns the status of a room; None if it is unknown or its end is forgotten."""
        known = self._rooms.get(room)
        return self._ended.get(room) if known is None else known.status

    # The reason to refuse a request: the first one whose condition holds

    def _no_init(self, message: TransferEmbeddingInfo, room: Room | None) -> str:
        session = message.mooncake_session_id
        obstacle = self._registrations.obstacle(session)
        if room is None:
            return _first((
                (bool(obstacle), obstacle),
                (message.room in self._ended, "the room is over"),
                (len(self._rooms) >= MAX_ROOMS, f"{MAX_ROOMS} rooms are open"),
            ))  # fmt: skip
        return _first((
            (bool(obstacle), obstacle),
            (session in room.members, "the session has asked for this room already"),
            (room.complete or room.rounds > 0, "every destination rank of the room has asked already"),
            *_out_of_step(message, room),
        ))  # fmt: skip

    def _no_resume(self, message: TransferEmbeddingInfo, room: Room | None) -> str:
        if room is None:
            return "the room is over" if message.room in self._ended else "the room is unknown"
        session = message.mooncake_session_id
        return _first((
            (session not in room.members, "the session is no destination of this room"),
            (not room.rounds, "nothing of the room has been transferred; there is nothing to resume"),
            (bool(room.in_flight), "an earlier transfer of the room is still being written"),
            (session in room.asked, "the session has asked for this resume already"),
            (message.sent_tokens != room.sent_tokens,
             f"sent_tokens is {message.sent_tokens}, but {room.sent_tokens} have been sent"),
            (message.required_dst_info_num != len(room.members),
             f"required_dst_info_num is {message.required_dst_info_num}, but the room has {len(room.members)} ranks"),
            *_out_of_step(message, room),
        ))  # fmt: skip

    # Rounds

    def _begin_round(self, room: Room, now: float) -> list[Command]:
        if not room.complete:
            return []
        if room.total_tokens == UNKNOWN_LENGTH:
            if room.opened:
                room.deadline = now + self.settings.waiting_timeout
            return []
        room.rounds += 1
        room.round_tokens = min(room.total_tokens - room.sent_tokens, next(iter(room.asked.values())).allocated_tokens)
        room.in_flight = set(room.asked)
        return [self._write(room, info) for info in room.asked.values()]

    def _write(self, room: Room, info: TransferEmbeddingInfo) -> WriteBlocks:
        initial = room.sent_tokens == 0
        blocks = -(-room.round_tokens // self.wire.block_size)
        blocks = max(blocks, int(initial))  # aux_datas needs a block even if there are no tokens
        session = info.mooncake_session_id
        return WriteBlocks(
            room.room, session, self._registrations.pointers(session), info.dst_embedding_indices[:blocks],
            room.sent_tokens, room.round_tokens, initial,
        )  # fmt: skip

    def _end_round(self, room: Room, now: float) -> list[Command]:
        if room.in_flight:
            return []
        if room.failure:
            return self._end(room, KVPoll.Failed, room.failure)
        room.sent_tokens += room.round_tokens
        if room.sent_tokens == room.total_tokens:
            return self._end(room, KVPoll.Success, "")
        room.asked.clear()
        room.deadline = now + self.settings.transfer_timeout
        return list(_reports(room, KVPoll.Transferring))

    def _fail(self, room: Room, reason: str) -> list[Command]:
        room.failure = room.failure or reason
        return [] if room.in_flight else self._end(room, KVPoll.Failed, room.failure)

    def _end(self, room: Room, status: KVPoll, reason: str) -> list[Command]:
        del self._rooms[room.room]
        self._ended[room.room] = status
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        accepted = [command for session in room.members for command in self._registrations.released(session)]
        return [*_reports(room, status), Ended(room.room, status, reason), *accepted]


def _first(reasons: Iterable[tuple[bool, str]]) -> str:
    return next((reason for holds, reason in reasons if holds), "")


def _out_of_step(message: TransferEmbeddingInfo, room: Room) -> Iterable[tuple[bool, str]]:
    """Yields the values that must equal those of a rank that has asked in this round, as (differs, reason)."""
    for other in list(room.asked.values())[:1]:
        for name in ("required_dst_info_num", "allocated_tokens"):
            ours, theirs = getattr(message, name), getattr(other, name)
            yield ours != theirs, f"{name} is {ours}, but another rank of the room sent {theirs}"


def _reports(room: Room, status: KVPoll) -> Iterable[Report]:
    return (Report(room.room, info.endpoint, info.dst_port, status) for info in room.members.values())


def _overdue(room: Room) -> str:
    """Returns the reason of a time-out: the event that did not come."""
    if not room.opened:
        return "the receiver asked, but there was no such request on the encode side in time"
    if room.rounds:
        return "not every destination rank has asked for the rest in time"
    return "the embedding was not made in time" if room.complete else "not every destination rank has asked in time"
