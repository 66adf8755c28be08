"""The rooms of one sender: a state machine that turns messages, calls and time into commands.

A room goes through rounds. Every destination rank sends an initial request in the first round and a resume in each
later one. A round begins when all ``required_dst_info_num`` ranks have asked, and ends when every write of it is over.
All ranks must request the same range in a round. A message that does not fit is refused with a reason and changes
nothing. No status is reported while a write of its room is in flight, because the receiver frees its blocks when it
hears one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from embferry.protocol.errors import CapacityError, LocalProtocolError, RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .messages import EmbeddingArgsRegisterInfo, Generation, OriginWire, TransferEmbeddingInfo, read

MAX_ROOMS = 16384
"""Largest number of live rooms, including those that only a receiver has asked for."""
MAX_ENDED = 16384
"""Number of ended rooms that are remembered, so that late messages do not open them again."""
MAX_SESSIONS = 4096
"""Largest number of registrations."""

UNKNOWN_LENGTH = -1

# Commands: the effects of the rules, to be executed in the order given


@dataclass(frozen=True, slots=True)
class Registered:
    """The buffers of a session are known now. What was cached about an earlier engine at its address is obsolete."""

    session: str
    pointers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Write tokens ``[sent_tokens, sent_tokens + num_tokens)`` of the room into ``blocks`` of a session.

    Call ``SenderRooms.written`` when no byte of the write is in flight any more.
    """

    room: int
    session: str
    pointers: tuple[int, ...]  # base address of each buffer of that session; a block is a row of each
    blocks: tuple[int, ...]
    sent_tokens: int
    num_tokens: int
    aux: bool  # whether aux_datas is written with the first block


@dataclass(frozen=True, slots=True)
class Report:
    """Push ``[room, status]`` to the receiver at ``endpoint`` and ``port``."""

    room: int
    endpoint: str
    port: int
    status: KVPoll


@dataclass(frozen=True, slots=True)
class Ended:
    """The room is over, and its embedding is not read any more. ``reason`` is empty after a success."""

    room: int
    status: KVPoll
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was refused and had no other effect. Log it, because the origin has no message to tell the peer."""

    reason: str
    room: int | None = None
    session: str | None = None


Command = Registered | WriteBlocks | Report | Ended | Refused


@dataclass(slots=True)
class Room:
    """One transfer to all its destination ranks."""

    room: int
    deadline: float  # when the room fails, unless a write is in flight
    opened: bool = False  # by this side; if not, only a receiver has asked for it
    total_tokens: int = UNKNOWN_LENGTH  # until the embedding is made
    sent_tokens: int = 0  # in the rounds that have ended
    members: dict[str, TransferEmbeddingInfo] = field(default_factory=dict)  # the initial request of each session
    asked: dict[str, TransferEmbeddingInfo] = field(default_factory=dict)  # for the next round, by session
    in_flight: set[str] = field(default_factory=set)  # sessions that are being written to
    round_tokens: int = 0
    rounds: int = 0  # that have begun
    failure: str = ""  # while writes are still in flight

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


class Registrations:
    """Where the buffers of each session are, for a bounded number of sessions.

    A registration is never replaced while a room uses it, because tokens would go to addresses that mean something
    else. A different registration waits until those rooms are over, and until then the session may request nothing new.

    Args:
        in_use: Returns the sessions that the live rooms have among their destinations.
    """

    def __init__(self, in_use: Callable[[], set[str]]) -> None:
        self._in_use = in_use
        self._known: dict[str, EmbeddingArgsRegisterInfo] = {}
        self._waiting: dict[str, EmbeddingArgsRegisterInfo] = {}

    def register(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        """Accepts a registration, keeps it until its session is idle, or refuses it."""
        session = info.mooncake_session_id
        known = self._known.get(session)
        if known == info:
            self._waiting.pop(session, None)
            return [Refused("registered already, with the same buffers", session=session)]
        if known is not None and session in self._in_use():
            self._waiting[session] = info
            return [Refused("registered already, with other buffers that a transfer uses", session=session)]
        if known is None and len(self._known) >= MAX_SESSIONS and not self._forget_one():
            return [Refused(f"{MAX_SESSIONS} sessions are registered and in use", session=session)]
        return self._accept(info)

    def pointers(self, session: str) -> tuple[int, ...]:
        """Returns the base pointers of a registered session."""
        return self._known[session].dst_embedding_ptrs

    def obstacle(self, session: str) -> str:
        """Returns why this session may not request a transfer now; an empty string if it may."""
        if session not in self._known:
            return "the session is not registered"
        if session in self._waiting:
            return "the session has registered other buffers while a transfer uses the earlier ones"
        return ""

    def released(self, session: str) -> list[Command]:
        """Accepts the waiting registration of a session, one of whose rooms has ended, if no other room uses it."""
        if session not in self._waiting or session in self._in_use():
            return []
        return self._accept(self._waiting.pop(session))

    def _accept(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        session = info.mooncake_session_id
        self._known.pop(session, None)  # the newest stands last
        self._known[session] = info
        return [Registered(session, info.dst_embedding_ptrs)]

    def _forget_one(self) -> bool:
        """Forgets the oldest registration that no room uses. Returns whether there was one."""
        in_use = self._in_use()
        oldest = next((session for session in self._known if session not in in_use), None)
        if oldest is not None:
            del self._known[oldest]
        return oldest is not None


class SenderRooms:
    """The rooms. Calls return the commands to execute, in order. ``now`` is in seconds on a clock that never goes back.

    The time-outs: ``bootstrap_timeout`` until every rank has asked, ``waiting_timeout`` until the embedding is made,
    ``transfer_timeout`` until every rank has asked for the rest. A write has no time-out here, because the engine
    reports the end of every write. A call that is wrong in the state of its room raises :class:`LocalProtocolError`.
    """

    def __init__(self, wire: OriginWire, settings: TransferSettings) -> None:
        if wire.generation is not Generation.BLOCKS:
            raise LocalProtocolError(f"transfers use generation blocks, not {wire.generation.value}")
        self.wire, self.settings = wire, settings
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

    def open(self, room: int, now: float) -> None:
        """Opens a room that the encode side will serve. Its receiver may have asked for it before."""
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

    def ready(self, room: int, total_tokens: int, now: float) -> list[Command]:
        """Records that the embedding of ``total_tokens`` tokens is made."""
        known = self._rooms.get(room)
        if known is None or not known.opened or known.total_tokens != UNKNOWN_LENGTH:
            raise LocalProtocolError("the room is not waiting for its embedding", room=room)
        if total_tokens < 0:
            raise LocalProtocolError(f"an embedding of {total_tokens} tokens", room=room)
        known.total_tokens = total_tokens
        return self._begin_round(known, now)

    def written(self, room: int, session: str, now: float, failure: str = "") -> list[Command]:
        """Records the end of a write; ``failure`` is the reason if not all bytes were written."""
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
        return [*_reports(room, KVPoll.Transferring)]

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


def _reports(room: Room, status: KVPoll) -> list[Report]:
    return [Report(room.room, info.endpoint, info.dst_port, status) for info in room.members.values()]


def _overdue(room: Room) -> str:
    """Returns the reason of a time-out: the event that did not come."""
    if not room.opened:
        return "the receiver asked, but there was no such request on the encode side in time"
    if room.rounds:
        return "not every destination rank has asked for the rest in time"
    return "the embedding was not made in time" if room.complete else "not every destination rank has asked in time"
