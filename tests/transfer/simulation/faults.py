"""Moves by which foreign code raises or is slow: sinks, callbacks, sources, transports, threads; and our machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .moves import MOST_ROOMS, move, pick, running
from .rooms import Room

if TYPE_CHECKING:
    from .simulation import Simulation

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
        room.breakable.armed[("make", "make", "wrong", "copy_in", "copied")[b % 5]] = s.fault(c)


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


TRANSPORT_METHODS = (
    "connect",
    "write",
    "admit",
    "revoke",
    "close_blocks",
    "poll",
    "connect_to_sender",
    "close",
    "poll",
)


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
SENDER_METHODS = (
    "receive",
    "expire",
    "take_commands",
    "write_done",
    "write_failed",
    "next_timeout",
    "settled",
    "abort",
)


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
