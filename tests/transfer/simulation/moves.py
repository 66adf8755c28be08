"""The moves of users, processes and wires. Each has three small numbers, which mean something modulo what exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from embferry import EmbeddingTransferError
from embferry.transfer.handle import ENDED

from .rooms import ANYTHING, Room

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
    produce_all(room)


def produce_all(room: Room) -> None:
    """Produces everything at every sending end of a room."""
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
    sending = again.open_sender(worker, 0)
    assert room.receiver is not None
    last = room.receiver._record
    if last.error is not None and (last.is_broken or not last.machine or not last.machine.peer_knows):
        for excuses in (again.excuses, sending.excuses):
            excuses.add(ANYTHING)  # the last receiver may still tell the sender of its room that it has failed
    again.produce(sending, again.tokens // (1 + c % 3))
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
