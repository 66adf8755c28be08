"""Moves of peers that lie, send noise, or flood a worker."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec

from embferry.protocol.messages import (
    VERSION,
    Abort,
    Body,
    Chunk,
    Closed,
    Confirm,
    Drain,
    Drained,
    Frame,
    Grant,
    Offer,
    Open,
    Pending,
    Progress,
    TransportAddress,
    Unknown,
    WriteFailed,
    Written,
    encode,
)
from embferry.protocol.sender import Sender
from embferry.transfer.control.contract import Received

from .moves import move, pick
from .rooms import Room, Sending

if TYPE_CHECKING:
    from .simulation import Simulation


@move
def lie(s: Simulation, a: int, b: int, c: int) -> None:
    """The peer of one end says something wrong, in a message that is well formed."""
    room = pick([r for r in s.rooms if r.is_there and r.receiver is not None and r.receiver._record.machine], a)
    if room is None or room.receiver is None:
        return
    machine, sending = room.receiver.machine, room.current
    rng = random.Random(f"{s.story.seed} {a} {b} {c}")
    if b % 2 and machine.peer:
        room.lied = True
        excuse_room(room)
        body = lie_to_receiver(room, rng, b // 2, c)
        frame = Frame(VERSION, machine.peer, machine.session, body)
        room.language.runtime.control.arrived(Received(room.endpoint, encode(frame)))
    elif sending is not None and sending.is_there:
        source: Sender = sending.end.machine
        peer = sending.end._record.peers.get(machine.session)
        if peer is not None:
            room.lied = True
            excuse_room(room)
            body = lie_to_sender(s, room, sending, rng, b // 2, c)
            frame = Frame(VERSION, machine.session, source.session, body)
            sending.worker.runtime.control.arrived(Received(peer, encode(frame)))


def excuse_room(room: Room) -> None:
    room.excuses.add("")
    for sending in room.senders:
        sending.excuses.add("")


def some_epoch(room: Room, rng: random.Random) -> int:
    assert room.receiver is not None
    known = list(room.receiver.machine.ledger.grants)
    return rng.choice([*known, *known, rng.randrange(60), 1 << 40])


def lie_to_receiver(room: Room, rng: random.Random, b: int, c: int) -> Body:
    assert room.receiver is not None
    m, number, epoch = room.receiver.machine, room.number, some_epoch(room, rng)
    total = rng.choice((-1, 0, 1, 5, room.tokens, room.tokens + 1, 100, 101, 1 << 39))
    digest = rng.choice((b"", b"x", m.content_digest or b"y"))
    checksum = rng.choice((None, rng.randbytes(8)))
    offset, length = rng.choice((0, 4, 8, 1 << 39)), rng.choice((1, 4, 8, 1 << 31))
    bodies: tuple[Body, ...] = (
        Offer(number, m.generation, 1, rng.choice(("first", "second", "third")), total, digest, (1, 2)),
        Offer(number, m.generation + c % 2, c % 3, m.transport or "first", total, digest),
        Written(number, epoch, (Chunk(offset, length, checksum),)),
        Written(number, epoch, tuple(Chunk(4 * i, 4, checksum) for i in range(16))),
        WriteFailed(number, epoch, offset, length, "transport_error", "a lie", bool(c % 2)),
        Drained(number, (epoch, *m.ledger.grants)),
        Closed(number),
        Unknown(number, m.peer if c % 2 else 7),
        Pending(number, epoch),
        Abort(number, rng.choice(("aborted", "no such code")), "a lie", m.generation),
    )
    return bodies[b % len(bodies)]


def lie_to_sender(s: Simulation, room: Room, sending: Sending, rng: random.Random, b: int, c: int) -> Body:
    number, epoch = room.number, some_epoch(room, rng)
    blocks = s.geometry.num_blocks
    runs = rng.choice((((0, 1),), ((0, blocks),), ((blocks - 1, 2),), ((0, 1), (0, 1)), ((1, 1), (0, 1))))
    tokens = rng.choice((1, 4, 4 * blocks, 1 << 31))
    start, floor = rng.choice((0, 4, 1 << 39)), rng.choice((0, epoch, 1 << 40))
    bodies: tuple[Body, ...] = (
        Grant(number, rng.choice((epoch, 1 << 50)), start, tokens, runs, floor, rng.choice(("first", "second", "x"))),
        Grant(number, (1 << 50) + c, 0, 4, ((c % blocks, 1),), 0, "first"),
        Progress(number, rng.choice((0, room.tokens, 1 << 39)), floor),
        Drain(number, (epoch, *range(c))),
        Confirm(number, rng.choice((room.tokens, 0, 1 << 39))),
        Abort(number, "aborted", "a lie"),
        lying_open(s, room, rng, c),
    )
    return bodies[b % len(bodies)]


def lying_open(s: Simulation, room: Room, rng: random.Random, c: int) -> Open:
    geometry = s.geometry if c % 2 else msgspec.structs.replace(s.geometry, num_blocks=1 + c)
    transports = tuple(TransportAddress(name, rng.randbytes(20)) for name in ("first", "second")[: 1 + c % 2])
    return Open(room.number, 1 + c % 5, (1, 1 + c % 3), geometry, "liar", transports, c)


@move
def noise(s: Simulation, a: int, b: int, c: int) -> None:
    """Bytes that are no message arrive, or a message with one bit flipped of a room of its own."""
    worker = [*s.language, *s.encode][a % 4]
    rng = random.Random(f"{s.story.seed} {a} {b} {c}")
    data = rng.randbytes(b)
    worker.runtime.control.arrived(Received("tcp://10.9.9.9:9", data))


@move
def flood(s: Simulation, a: int, b: int, c: int) -> None:
    """A peer opens many rooms that do not exist, or sends to one room under many sessions."""
    worker = s.encode[a % 2]
    control = worker.runtime.control
    transports = (TransportAddress("first", bytes(b)),)
    room = pick([r for r in s.rooms if r.current and r.current.worker is worker], c)
    for number in range(150):
        if room is None or b % 2:
            body: Body = Open(10**6 + number, 1, (1, 1), s.geometry, "flood", transports, 0)
        else:
            body = Progress(room.number, 0, 0)
        control.arrived(Received("flood", encode(Frame(VERSION, 10**9 + number, 0, body))))
