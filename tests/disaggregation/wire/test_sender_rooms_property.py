"""For any messages in any order, every rank gets every token once, and no status is sent during a write."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from embferry.disaggregation.wire.messages import OriginWire
from embferry.disaggregation.wire.sender_rooms import (
    Command,
    Ended,
    RefusedInitError,
    Registered,
    Report,
    SenderRooms,
    WriteBlocks,
)
from embferry.protocol.errors import Aborted, LocalProtocolError, RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from tests.disaggregation.wire.messages import POINTERS, init, register, resume, session_of

WIRE = OriginWire(num_blocks=8, block_size=4)
SETTINGS = TransferSettings(bootstrap_timeout=8, waiting_timeout=8, transfer_timeout=8)
ROOMS = st.integers(1, 3)
RANKS = st.integers(0, 1)
BLOCKS = st.lists(st.integers(0, 8), max_size=4)


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """Draws messages that are mostly valid."""
    session, blocks = session_of(draw(RANKS)), draw(BLOCKS)
    moved = tuple(pointer + draw(st.sampled_from([0, 0, 0, 4096])) for pointer in POINTERS)
    common: dict[str, Any] = {
        "room": draw(ROOMS),
        "session": session,
        "blocks": ",".join(map(str, blocks)).encode(),
        "ranks": draw(st.sampled_from([1, 2, 2])),
        "allocated": len(blocks) * 4,
    }
    sent = draw(st.sampled_from([4, 8, 12, 16, 20, 5]))
    kind = draw(st.sampled_from(["register", "init", "init", "resume", "resume", "noise"]))
    return {
        "register": register(session, moved),
        "init": init(**common),
        "resume": resume(sent, **common),
        "noise": draw(st.lists(st.binary(max_size=8), max_size=9)),
    }[kind]


STEPS = st.lists(
    st.tuples(st.just("receive"), messages())
    | st.tuples(st.just("open"), ROOMS)
    | st.tuples(st.just("ready"), ROOMS, st.integers(0, 24))
    | st.tuples(st.just("written"), st.sampled_from(["", "", "", "broken"]))
    | st.tuples(st.just("abort"), ROOMS)
    | st.tuples(st.just("wait"), st.floats(0, 10)),
    max_size=60,
)


class Watch:
    """Checks every command against the earlier ones."""

    def __init__(self) -> None:
        self.registered: dict[str, tuple[int, ...]] = {}
        self.in_flight: list[WriteBlocks] = []
        self.sent: dict[tuple[int, str], int] = defaultdict(int)
        self.live: set[int] = set()

    def see(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Registered(session, pointers):
                    assert not any(write.session == session for write in self.in_flight)
                    self.registered[session] = pointers
                case WriteBlocks():
                    self._write(command)
                case Report(room, _, _, status):
                    assert status in (KVPoll.Transferring, KVPoll.Success, KVPoll.Failed)
                    assert not any(write.room == room for write in self.in_flight)
                case Ended(room, error):
                    assert not any(write.room == room for write in self.in_flight)
                    reported = {c.status for c in commands if isinstance(c, Report) and c.room == room}
                    assert reported <= {KVPoll.Success if error is None else KVPoll.Failed}
                    for key in [key for key in self.sent if key[0] == room]:
                        del self.sent[key]

    def refused(self, report: Report, session: str) -> None:
        """An init was refused: no write to that session in that room may be in flight."""
        assert report.status is KVPoll.Failed
        assert not any((write.room, write.session) == (report.room, session) for write in self.in_flight)

    def _write(self, write: WriteBlocks) -> None:
        key = write.room, write.session
        assert write.pointers == self.registered[write.session]
        assert write.sent_tokens == self.sent[key]
        assert write.aux == (write.sent_tokens == 0)
        assert (
            write.num_tokens <= len(write.blocks) * WIRE.block_size < write.num_tokens + WIRE.block_size + 4 * write.aux
        )
        assert not any((other.room, other.session) == key for other in self.in_flight)
        self.sent[key] += write.num_tokens
        self.in_flight.append(write)


def take(rooms: SenderRooms, watch: Watch, step: tuple[Any, ...], now: float) -> None:
    match step:
        case ("receive", message):
            with suppress(RemoteProtocolError):
                try:
                    watch.see(rooms.receive(message, now))
                except RefusedInitError as refused:
                    watch.refused(refused.report, message[3].decode())
        case ("open", room):
            rooms.open(room, now)
        case ("ready", room, total):
            watch.see(rooms.ready(room, total, now))
        case ("written", failure) if watch.in_flight:
            write = watch.in_flight.pop(0)
            watch.see(rooms.written(write.room, write.session, now, failure))
        case ("abort", room):
            watch.see(rooms.abort(room, Aborted("asked for")))


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_every_token_is_written_once_for_any_messages(steps: list[tuple[Any, ...]]) -> None:
    rooms, watch, now = SenderRooms(WIRE, SETTINGS), Watch(), 0.0
    for rank in (0, 1):
        watch.see(rooms.receive(register(session_of(rank)), now))
    for step in steps:
        if step[0] == "wait":
            now += step[1]
            watch.see(rooms.tick(now))
        try:
            take(rooms, watch, step, now)
        except LocalProtocolError:
            assert step[0] in ("open", "ready")
    while watch.in_flight:
        write = watch.in_flight.pop()
        watch.see(rooms.written(write.room, write.session, now))
    watch.see(rooms.tick(now + 10))
    assert rooms.next_timeout() is None  # every room has ended


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_any_length_is_written_through_any_allocations(total: int, counts: list[int], ranks: int) -> None:
    rooms, watch = SenderRooms(WIRE, SETTINGS), Watch()
    for rank in range(ranks):
        watch.see(rooms.receive(register(session_of(rank)), 0))
    room = rooms.open(1, 0)
    watch.see(rooms.ready(1, total, 0))
    sent = 0
    for round_number in range(100):
        count = counts[round_number % len(counts)]
        blocks = ",".join(map(str, range(count))).encode()
        for rank in range(ranks):
            session = session_of(rank)
            asked = (1, session, blocks, ranks, count * 4)
            watch.see(rooms.receive(resume(sent, *asked) if sent else init(*asked), 0))
        assert len(watch.in_flight) == ranks
        sent += watch.in_flight[0].num_tokens
        while watch.in_flight:
            watch.see(rooms.written(1, watch.in_flight.pop().session, 0))
        if room.status is not KVPoll.Transferring:
            break
    assert (room.status, sent) == (KVPoll.Success, total)
