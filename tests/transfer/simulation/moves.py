"""The moves of a story. Each has three small numbers, which mean something modulo what exists."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from embferry import EmbeddingTransferError
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
from embferry.protocol.states import TERMINAL
from embferry.transfer.control.contract import Received
from embferry.transfer.handle import ENDED

from .rooms import Room, Sending

if TYPE_CHECKING:
    from .simulation import Simulation, Worker

T = TypeVar("T")
PlayMove = Callable[["Simulation", int, int, int], None]
MOST_ROOMS = 10
UNLUCKY = ("silent", "no token", "has not", "was lost", "link", "cannot be reached", "produced nothing", "no language")
"""Texts of the errors that bad weather causes where time-outs are short."""

MOVES: dict[str, PlayMove] = {}


def move(play: PlayMove) -> PlayMove:
    MOVES[play.__name__] = play
    return play


def pick(items: Sequence[T], number: int) -> T | None:
    """Returns one of the items, or None if there is none."""
    return items[number % len(items)] if items else None


def running(workers: list[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.is_there and not worker.runtime.stopped]


# What users do


@move
def begin(s: Simulation, a: int, b: int, c: int) -> None:
    """A room is opened: by its sender, by its receiver, or by both."""
    encode, language = s.encode[c % 2], s.language[c // 2 % 2]
    if len(s.rooms) >= MOST_ROOMS or encode not in running(s.encode) or language not in running(s.language):
        return
    tokens = a if a <= 60 else 0
    number = len(s.rooms) + 100 * (len(s.gone) + 1)
    room = Room(s, number, tokens, b // 4, language, c)
    s.rooms.append(room)
    if b % 4 != 1:
        sending = room.open_sender(encode, 0, device=c % 5 == 4, broken=False)
        if b % 4 != 2:
            room.produce(sending, tokens if c % 3 else tokens // 2)
    if b % 4 != 2:
        room.open_receiver(encode.runtime.endpoint, 20.0 if c % 4 == 3 else None)
    else:
        room.endpoint = encode.runtime.endpoint


@move
def other_end(s: Simulation, a: int, b: int, c: int) -> None:
    """The end that a room lacks is opened."""
    room = pick([r for r in s.rooms if r.receiver is None or r.current is None], a)
    if room is not None:
        open_missing(s, room)


def at_endpoint(s: Simulation, room: Room) -> Worker | None:
    """Returns the running encode worker that the receiver of a room asks."""
    return next((w for w in running(s.encode) if w.runtime.endpoint == room.endpoint), None)


def open_missing(s: Simulation, room: Room) -> None:
    """Opens the ends that a room lacks, where a process runs for them."""
    worker = at_endpoint(s, room)
    if room.receiver is None and room.language in running(s.language):
        room.open_receiver(room.endpoint, None)
    current = room.current
    if worker is not None and (current is None or current.worker is not worker):
        for sending in room.senders:
            sending.is_current = False
        room.open_sender(worker, 0)


def complete(s: Simulation, room: Room) -> None:
    """Opens the ends that a room lacks, and produces everything."""
    if not room.has_ended:
        with suppress(EmbeddingTransferError):
            open_missing(s, room)
    for sending in room.senders:
        with suppress(EmbeddingTransferError):
            room.produce(sending, room.tokens)


@move
def produce(s: Simulation, a: int, b: int, c: int) -> None:
    found = [(r, x) for r in s.rooms for x in r.senders if x.produced < r.tokens and x.worker in running(s.encode)]
    if (chosen := pick(found, a)) is not None:
        chosen[0].produce(chosen[1], b)


@move
def consume(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick([r for r in s.every_room() if r.kind == "chunks" and r.language in running(s.language)], a)
    for _ in range(b % 4 if room is not None else 0):
        assert room is not None
        room.release() if c % 2 else room.take()


@move
def read(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick([r for r in s.rooms if r.is_there and r.language in running(s.language)], a)
    if room is not None:
        room.read(commit=b % 2 == 0)


@move
def clear(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick([r for r in s.rooms if r.is_there and r.language in running(s.language) and not r.is_cleared], a)
    if room is not None and (room.has_ended or b % 3 == 0):
        room.check_ended()
        room.clear()


@move
def abort(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick(s.rooms, a)
    if room is None:
        return
    if b % 2 and room.receiver is not None and room.language in running(s.language):
        room.excuses.add("aborted by the language side")
        room.receiver.abort()
    elif (sending := room.current) is not None and sending.worker in running(s.encode):
        sending.excuses.add("aborted by the encode side")
        sending.end.abort()


@move
def redirect(s: Simulation, a: int, b: int, c: int) -> None:
    """A receiver is told to go on with the other encode worker, which has the same content or another."""
    room = pick([r for r in s.rooms if r.is_there and not r.has_ended and r.language in running(s.language)], a)
    if room is None or room.receiver is None:
        return
    others = [worker for worker in running(s.encode) if worker.runtime.endpoint != room.endpoint]
    worker = pick(others, b)
    if worker is None or room.receiver._record.poll() in ENDED:
        return
    if len(room.embeddings) > 1 and any(x.worker is worker for x in room.senders):
        return  # a late acknowledgement of its content would be taken for one of now
    there = next((x for x in room.senders if x.worker is worker and not x.has_ended), None)
    for sending in room.senders:
        sending.is_current = False
    if len(room.embeddings) > 1:
        room.excuses.add("now offers another content")
    if there is not None:
        there.is_current = True
    elif c % 3:
        version = 1 if c % 3 == 2 else 0
        if version:
            room.excuses.add("now offers another content")
        room.produce(room.open_sender(worker, version), room.tokens)
    room.endpoint = worker.runtime.endpoint
    room.receiver.redirect(room.endpoint)


@move
def reopen(s: Simulation, a: int, b: int, c: int) -> None:
    """A room that has ended is opened again."""
    ended = [r for r in s.rooms if r.is_there and r.has_ended and r.current and r.current.has_ended]
    room = pick([r for r in ended if r.language in running(s.language)], a)
    worker = None if room is None else at_endpoint(s, room)
    if room is None or worker is None:
        return
    again = Room(s, room.number, b % 60, c, room.language, c)
    s.rooms[s.rooms.index(room)] = again
    s.gone.append(room)
    again.embeddings = room.embeddings  # an end of the last transfer may still be there
    again.produce(again.open_sender(worker, 0), again.tokens // (1 + c % 3))
    again.open_receiver(room.endpoint, None)


@move
def wait(s: Simulation, a: int, b: int, c: int) -> None:
    """Time passes: seconds for a patient worker, longer than its time-outs for an impatient one."""
    s.world.run(a / 32 if s.is_patient else a / 8)


# Processes and wires


@move
def weather(s: Simulation, a: int, b: int, c: int) -> None:
    s.world.weather.loss = (0.0, 0.1, 0.3, 0.6)[a % 4]
    s.world.weather.repeat = (0.0, 0.2, 0.5)[a // 4 % 3]
    s.world.weather.delay = (0.01, 0.01, 0.2, 2.0)[b % 4]
    s.world.weather.latency = (0.001, 0.02, 0.3)[c % 3]


@move
def cut(s: Simulation, a: int, b: int, c: int) -> None:
    pair = frozenset((s.language[a % 2].name, s.encode[b % 2].name))
    s.world.cut ^= {pair}


@move
def reset(s: Simulation, a: int, b: int, c: int) -> None:
    worker = s.language[a % 2]
    s.world.reset(worker.runtime.control, s.encode[b % 2].runtime.endpoint)


@move
def pause(s: Simulation, a: int, b: int, c: int) -> None:
    worker = pick(running([*s.language, *s.encode]), a)
    if worker is not None:
        worker.runtime.pause()
    

@move
def resume(s: Simulation, a: int, b: int, c: int) -> None:
    worker = pick([w for w in [*s.language, *s.encode] if w.runtime.stopped and w.is_there], a)
    if worker is not None:
        worker.runtime.resume()


@move
def kill_encode(s: Simulation, a: int, b: int, c: int) -> None:
    """An encode worker dies; a new one takes its endpoint, or another."""
    at = a % 2
    dead = s.encode[at]
    s.kill(dead)
    s.encode[at] = s.start_encode(dead.runtime.endpoint if b % 2 else "")


@move
def kill_language(s: Simulation, a: int, b: int, c: int) -> None:
    at = a % 2
    s.kill(s.language[at])
    s.language[at] = s.start_language()


@move
def replace_worker(s: Simulation, a: int, b: int, c: int) -> None:
    """A manager is closed, and a new one made."""
    worker = [*s.language, *s.encode][a % 4]
    if worker.runtime.stopped or not worker.is_there:
        return
    s.close(worker)
    if worker in s.language:
        s.language[s.language.index(worker)] = s.start_language()
    else:
        s.encode[s.encode.index(worker)] = s.start_encode(worker.runtime.endpoint if b % 2 else "")


MOVES["replace"] = MOVES.pop("replace_worker")


# Foreign code

SINK_METHODS = ("granted", "needs_preparation", "prepare", "verify", "deliver", "restart", "is_complete")


@move
def break_sink(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick([r for r in s.rooms if not r.has_ended], a)
    if room is not None:
        room.breakable.armed[SINK_METHODS[b % len(SINK_METHODS)]] = s.fault(c)


@move
def break_make(s: Simulation, a: int, b: int, c: int) -> None:
    room = pick([r for r in s.rooms if not r.has_ended and r.kind in ("make", "device")], a)
    if room is not None:
        room.breakable.armed[("make", "make", "wrong", "copy_in", "landed")[b % 5]] = s.fault(c)


@move
def break_callback(s: Simulation, a: int, b: int, c: int) -> None:
    """A callback raises at the next change, or is slow, or takes chunks; a waiter's event loop is closed."""
    room = pick([r for r in s.rooms if r.is_there and r.language in running(s.language)], a)
    if room is None or room.receiver is None:
        return
    ends: list[Any] = [(room.receiver, room.excuses)]
    ends += [(x.end, x.excuses) for x in room.senders if x.worker in running(s.encode)]
    end, excuses = ends[b % len(ends)]
    fault = s.fault(c)

    def raise_it() -> None:
        s.check_no_lock("a callback")
        if fault.is_slow:
            s.world.run(0.4)
            return
        excuses.add(fault.marker)
        raise fault.error()

    def closed_loop() -> None:
        s.check_no_lock("a waiter")
        raise fault.error()

    def consumes() -> None:
        s.check_no_lock("a callback")
        room.take()
        room.release()
        room.read(commit=b % 8 == 0)

    choice = 1 if fault.is_slow else b // 4 % 3
    if choice == 0:
        room.stops.append(end.wake_on_change(closed_loop))
    else:
        room.stops.append(end.on_change(raise_it if choice == 1 else consumes))


@move
def break_source(s: Simulation, a: int, b: int, c: int) -> None:
    """A room is begun whose embedding cannot be read, once."""
    encode, language = s.encode[c % 2], s.language[c // 2 % 2]
    if len(s.rooms) >= MOST_ROOMS or encode not in running(s.encode) or language not in running(s.language):
        return
    room = Room(s, len(s.rooms) + 100 * (len(s.gone) + 1), 1 + a % 60, b, language, c)
    s.rooms.append(room)
    sending = room.open_sender(encode, 0, device=b % 2 == 0, broken=True)
    room.produce(sending, room.tokens)
    room.open_receiver(encode.runtime.endpoint, None)


TRANSPORT_METHODS = ("connect", "write", "admit", "revoke", "close_blocks", "poll", "connect_to_sender", "close", "poll")


@move
def break_transport(s: Simulation, a: int, b: int, c: int) -> None:
    """A method of a transport raises once. In one story, it is always the same transport."""
    name = ("first", "second")[c // 8 % 2]
    s.faulty_transport = s.faulty_transport or name
    worker = pick([w for w in [*s.language, *s.encode] if w.is_there], a)
    if worker is None:
        return
    transport = next(t for t in worker.transports if t.name == s.faulty_transport)
    method = TRANSPORT_METHODS[b % len(TRANSPORT_METHODS)]
    fault = s.fault(c % 5)
    transport.breakable.armed[method] = replace(fault, late=c >= 32)
    if b >= 36:  # and it cannot be closed either
        transport.breakable.armed["close"] = s.fault(c % 5)
    if "close" in transport.breakable.armed:
        s.unclosed.add(worker)


@move
def break_control(s: Simulation, a: int, b: int, c: int) -> None:
    """The control plane raises once: nothing is lost but what it was about to do."""
    worker = pick([w for w in [*s.language, *s.encode] if w.is_there], a)
    if worker is not None:
        _raise_once(worker.runtime.control, ("send", "send", "poll", "flush", "forget")[b % 5], s.fault(c % 5).error())


def _raise_once(target: object, name: str, error: Exception, fired: Callable[[], object] = lambda: None) -> None:
    """The next call of a method raises."""

    def raise_it(*arguments: object, **keywords: object) -> None:
        target.__dict__.pop(name, None)
        fired()
        raise error

    setattr(target, name, raise_it)


@move
def break_threads(s: Simulation, a: int, b: int, c: int) -> None:
    """The machine has no thread to give: a callback cannot be run, or a sink not be prepared."""
    worker = pick([w for w in [*s.language, *s.encode] if w.is_there], a)
    if worker is not None:
        fault = s.fault(c % 5)
        s.floating[fault.marker] = None
        worker.has_no_threads = True
        _raise_once(worker.runtime, "run_callback", fault.error())


RECEIVER_METHODS = (
    "receive",
    "expire",
    "take_commands",
    "verified_chunk",
    "consumed",
    "revoked",
    "wanted",
    "next_timeout",
    "settled",
    "grant",
    "abort",
    "clear",
    "transport_lost",
    "peer_unreachable",
)
SENDER_METHODS = ("receive", "expire", "take_commands", "write_done", "write_failed", "next_timeout", "settled", "abort")


@move
def break_machine(s: Simulation, a: int, b: int, c: int) -> None:
    """A bug of ours: a method of one machine raises once."""
    room = pick([r for r in s.rooms if r.receiver is not None], a)
    if room is None or room.receiver is None:
        return
    fault = s.fault(c % 5)
    sending = room.current

    def fired(excuses: set[str]) -> None:
        excuses.add(fault.marker)
        room.has_bug = True

    if c % 2 and sending is not None:
        target: Any = sending.end.machine
        excuses = sending.excuses
        name = SENDER_METHODS[b % len(SENDER_METHODS)]
    else:
        target = room.receiver._record.machine
        excuses = room.excuses
        name = RECEIVER_METHODS[b % len(RECEIVER_METHODS)]
    if target is not None:
        _raise_once(target, name, fault.error(), lambda: fired(excuses))


# Peers


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
    destination = sending.end.machine.current
    assert destination is not None or True
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


def is_over(room: Room) -> bool:
    return room.receiver is not None and room.receiver.machine.phase in TERMINAL
