"""The rooms of one sender: a state machine that turns messages, calls and time into commands.

A room goes through rounds. Every destination rank sends an initial request in the first round and a resume in each
later one. A round begins when all ``required_dst_info_num`` ranks have asked, and ends when every write of it is over.
All ranks must request the same range in a round. A message that does not fit is refused with a reason and changes
nothing. No status is reported while a write of its room is in flight, because the receiver frees its blocks when it
hears one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from embferry.protocol.errors import (
    CapacityError,
    EmbeddingTransferError,
    LeaseExpired,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .messages import (
    EmbeddingArgsRegisterInfo,
    Generation,
    Head,
    OriginWire,
    TransferEmbeddingInfo,
    read,
    read_init_head,
)
from .room import UNKNOWN_LENGTH, OriginRoom

MAX_ROOMS = 16384  # live rooms, including those that only a receiver has asked for
MAX_SESSIONS = 4096  # registrations

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
    """The room is over, and its embedding is not read any more. ``error`` is None after a success."""

    room: int
    error: EmbeddingTransferError | None


Command = Registered | WriteBlocks | Report | Ended


class RefusedInitError(RemoteProtocolError):
    """An init was refused. Its receiver must be told, because it has no time-out of its own.

    Attributes:
        report: The command that tells it.
    """

    def __init__(self, detail: str, head: Head | TransferEmbeddingInfo) -> None:
        super().__init__(detail, room=head.room)
        self.report = Report(head.room, head.endpoint, head.dst_port, KVPoll.Failed)


class SenderRoom(OriginRoom):
    """One transfer to all its destination ranks. Its deadline does not count while a write is in flight."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.opened = False  # by this side; if not, only a receiver has asked for it
        self.sent_tokens = 0  # in the rounds that have ended
        self.members: dict[str, TransferEmbeddingInfo] = {}  # the initial request of each session
        self.asked: dict[str, TransferEmbeddingInfo] = {}  # for the next round, by session
        self.in_flight: set[str] = set()  # sessions that are being written to
        self.round_tokens = 0
        self.failure: EmbeddingTransferError | None = None  # while writes are still in flight

    @property
    def first(self) -> TransferEmbeddingInfo | None:
        """The first request for the next round. Those of the other ranks must agree with it."""
        return next(iter(self.asked.values()), None)

    @property
    def complete(self) -> bool:
        """Whether every destination rank has asked in this round."""
        return self.first is not None and len(self.asked) == self.first.required_dst_info_num


class SenderRooms:
    """The rooms. Calls return the commands to execute, in order. ``now`` is in seconds on a clock that never goes back.

    The time-outs: ``bootstrap_timeout`` until every rank has asked, ``waiting_timeout`` until the embedding is made,
    ``transfer_timeout`` until every rank has asked for the rest. A write has no time-out here, because the engine
    reports the end of every write. A call that is wrong in the state of its room raises :class:`LocalProtocolError`.

    A registration is never replaced while a room uses it, because tokens would go to addresses that mean something
    else. A different registration waits until those rooms are over, and until then the session may request nothing new.
    """

    def __init__(self, wire: OriginWire, settings: TransferSettings) -> None:
        if wire.generation is not Generation.BLOCKS:
            raise LocalProtocolError(f"transfers use generation blocks, not {wire.generation.value}")
        self.wire, self.settings = wire, settings
        self._rooms: dict[int, SenderRoom] = {}
        self._registered: dict[str, EmbeddingArgsRegisterInfo] = {}  # by session, the newest last
        self._waiting: dict[str, EmbeddingArgsRegisterInfo] = {}  # until the registered one is not in use

    # Messages of receivers

    def receive(self, frames: Sequence[bytes], now: float) -> list[Command]:
        """Processes one message.

        Raises:
            RefusedInitError: An init was refused.
            RemoteProtocolError: The message was refused, and only a registration that has to wait has an effect.
        """
        try:
            message = read(frames, self.wire)
        except RemoteProtocolError as error:
            head = read_init_head(frames)
            if head is None or self._goes_on(head):
                raise
            raise RefusedInitError(error.detail, head) from None
        session = message.mooncake_session_id
        if isinstance(message, EmbeddingArgsRegisterInfo):
            return self._register(message)
        room = self._rooms.get(message.room)
        reason = self._obstacle(message, room)
        if reason:
            reason = f"{reason} (session {session})"
            if message.is_resume or self._goes_on(message):
                raise RemoteProtocolError(reason, room=message.room)
            raise RefusedInitError(reason, message)
        if room is None:
            room = self._rooms[message.room] = SenderRoom(message.room)
            room.deadline = now + self.settings.bootstrap_timeout
        room.members.setdefault(session, message)
        room.asked[session] = message
        return self._begin_round(room, now)

    def _goes_on(self, asked: Head | TransferEmbeddingInfo) -> bool:
        """Returns whether the session has asked for this room before and the room may go on."""
        room = self._rooms.get(asked.room)
        return room is not None and asked.mooncake_session_id in room.members

    def _obstacle(self, message: TransferEmbeddingInfo, room: SenderRoom | None) -> str:
        """Returns the first reason to refuse a request; an empty string if there is none."""
        session, ranks = message.mooncake_session_id, message.required_dst_info_num
        reasons = [
            (session not in self._registered, "the session is not registered"),
            (
                session in self._waiting,
                "the session has registered other buffers while a transfer uses the earlier ones",
            ),
        ]
        if room is None and message.is_resume:
            return "the room is unknown, or over"
        if room is None:
            return _first([*reasons, (len(self._rooms) >= MAX_ROOMS, f"{MAX_ROOMS} rooms are open")])
        begun = room.status is KVPoll.Transferring
        if message.is_resume:
            reasons = [
                (session not in room.members, "the session is no destination of this room"),
                (not begun, "nothing of the room has been transferred; there is nothing to resume"),
                (bool(room.in_flight), "an earlier transfer of the room is still being written"),
                (session in room.asked, "the session has asked for this resume already"),
                (message.sent_tokens != room.sent_tokens,
                 f"sent_tokens is {message.sent_tokens}, but {room.sent_tokens} have been sent"),
                (ranks != len(room.members),
                 f"required_dst_info_num is {ranks}, but the room has {len(room.members)} ranks"),
            ]  # fmt: skip
        else:
            reasons += [
                (session in room.members, "the session has asked for this room already"),
                (room.complete or begun, "every destination rank of the room has asked already"),
            ]
        for name in ("required_dst_info_num", "allocated_tokens") if room.first else ():
            ours, theirs = getattr(message, name), getattr(room.first, name)
            reasons.append((ours != theirs, f"{name} is {ours}, but another rank of the room sent {theirs}"))
        return _first(reasons)

    def _register(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        """Accepts a registration, keeps it until its session is idle, or refuses it."""
        session, in_use = info.mooncake_session_id, self._in_use()
        known = self._registered.get(session)
        if known == info:
            self._waiting.pop(session, None)
            raise RemoteProtocolError(f"registered already, with the same buffers (session {session})")
        if known is not None and session in in_use:
            self._waiting[session] = info
            why = "registered already, with other buffers that a transfer uses"
            raise RemoteProtocolError(f"{why} (session {session})")
        if known is None and len(self._registered) >= MAX_SESSIONS:
            idle = next((other for other in self._registered if other not in in_use), None)
            if idle is None:
                raise RemoteProtocolError(f"{MAX_SESSIONS} sessions are registered and in use (session {session})")
            del self._registered[idle]
        return self._accept(info)

    def _accept(self, info: EmbeddingArgsRegisterInfo) -> list[Command]:
        session = info.mooncake_session_id
        self._registered.pop(session, None)
        self._registered[session] = info
        return [Registered(session, info.dst_embedding_ptrs)]

    def _in_use(self) -> set[str]:
        """Returns the sessions that live rooms have among their destinations."""
        return {session for room in self._rooms.values() for session in room.members}

    # Calls of the encode side

    def open(self, room: int, now: float) -> SenderRoom:
        """Opens a room that the encode side will serve. Its receiver may have asked for it before.

        The number may be that of a room that is over. What its receivers have asked for since then is kept.
        """
        known = self._rooms.get(room)
        if known is not None and known.opened:
            raise LocalProtocolError("the room is open already", room=room)
        if known is None:
            if len(self._rooms) >= MAX_ROOMS:
                raise CapacityError(f"{MAX_ROOMS} rooms are open; end some first", room=room)
            known = self._rooms[room] = SenderRoom(room)
        known.opened = True
        known.deadline = now + (self.settings.waiting_timeout if known.complete else self.settings.bootstrap_timeout)
        return known

    def ready(self, room: int, total_tokens: int, now: float) -> list[Command]:
        """Records that the embedding of ``total_tokens`` tokens is made."""
        known = self._rooms.get(room)
        if known is None or not known.opened or known.total_tokens != UNKNOWN_LENGTH:
            raise LocalProtocolError("the room is not waiting for its embedding", room=room)
        known.total_tokens = total_tokens
        return self._begin_round(known, now)

    def written(self, room: int, session: str, now: float, failure: str = "") -> list[Command]:
        """Records the end of a write; ``failure`` is the reason if not all bytes were written."""
        known = self._rooms.get(room)
        if known is None or session not in known.in_flight:
            raise LocalProtocolError(f"no write to {session} is in flight", room=room)
        known.in_flight.remove(session)
        known.failure = known.failure or (TransportError(failure) if failure else None)
        if known.in_flight:
            return []
        known.sent_tokens += known.round_tokens
        if known.failure is not None or known.sent_tokens == known.total_tokens:
            return self._end(known, known.failure)
        known.asked.clear()
        known.deadline = now + self.settings.transfer_timeout
        return [*_reports(known)]

    def abort(self, room: int, error: EmbeddingTransferError) -> list[Command]:
        """Ends the room as soon as no write of it is in flight. Does nothing for a room that is over."""
        known = self._rooms.get(room)
        if known is None:
            return []
        known.failure = known.failure or error
        return [] if known.in_flight else self._end(known, known.failure)

    def tick(self, now: float) -> list[Command]:
        """Ends the rooms whose time-out has passed."""
        due = [room for room, deadline in self._deadlines() if deadline <= now]
        return [command for room in due for command in self._end(room, LeaseExpired(_overdue(room)))]

    def next_timeout(self) -> float | None:
        """Returns when :meth:`tick` has to be called next; None if it need not be called."""
        return min((deadline for _, deadline in self._deadlines()), default=None)

    def _deadlines(self) -> Iterator[tuple[SenderRoom, float]]:
        for room in self._rooms.values():
            if room.deadline is not None and not room.in_flight:
                yield room, room.deadline

    # Rounds

    def _begin_round(self, room: SenderRoom, now: float) -> list[Command]:
        if room.first is None or not room.complete:
            return []
        if room.total_tokens == UNKNOWN_LENGTH:
            room.status = KVPoll.WaitingForInput
            if room.opened:
                room.deadline = now + self.settings.waiting_timeout
            return []
        room.status = KVPoll.Transferring
        room.round_tokens = min(room.total_tokens - room.sent_tokens, room.first.allocated_tokens)
        room.in_flight = set(room.asked)
        return [self._write(room, info) for info in room.asked.values()]

    def _write(self, room: SenderRoom, info: TransferEmbeddingInfo) -> WriteBlocks:
        initial = room.sent_tokens == 0
        blocks = -(-room.round_tokens // self.wire.block_size)
        blocks = max(blocks, int(initial))  # aux_datas needs a block even if there are no tokens
        session = info.mooncake_session_id
        pointers, targets = self._registered[session].dst_embedding_ptrs, info.dst_embedding_indices[:blocks]
        return WriteBlocks(room.room, session, pointers, targets, room.sent_tokens, room.round_tokens, initial)

    def _end(self, room: SenderRoom, error: EmbeddingTransferError | None) -> list[Command]:
        if error is None:
            room.status = KVPoll.Success
        else:
            room.fail(error)
        del self._rooms[room.room]
        commands: list[Command] = [*_reports(room), Ended(room.room, error)]
        in_use = self._in_use() if self._waiting else set()
        for session in room.members:
            if session in self._waiting and session not in in_use:
                commands += self._accept(self._waiting.pop(session))
        return commands


def _first(reasons: Iterable[tuple[bool, str]]) -> str:
    return next((reason for holds, reason in reasons if holds), "")


def _reports(room: SenderRoom) -> list[Report]:
    return [Report(room.room, info.endpoint, info.dst_port, room.status) for info in room.members.values()]


def _overdue(room: SenderRoom) -> str:
    """Returns the reason of a time-out: the event that did not come."""
    if not room.opened:
        return "the receiver asked, but there was no such request on the encode side in time"
    if room.status is KVPoll.Transferring:
        return "not every destination rank has asked for the rest in time"
    return "the embedding was not made in time" if room.complete else "not every destination rank has asked in time"
