"""Faults of a stream of bytes, as data, and what becomes of the bytes that pass one. No sockets, no clock.

A fault is armed for one direction of all connections of a proxy. Each connection counts its bytes from then on; the
fault strikes the first one that reaches the place, once. With messages in place of bytes, it strikes whole messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Fault", "FaultInjector", "FaultyStream", "Kind", "Split", "Toward"]

Kind = Literal["flip", "duplicate", "drop", "reorder", "swallow", "delay", "stall", "cut", "reset"]
Toward = Literal["clients", "upstream"]
Split = Callable[[bytes], Iterable[bytes]]
"""Takes the bytes of one connection in one direction, and returns the messages that they complete."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault at one place of a stream.

    Attributes:
        kind: ``flip`` changes one bit. ``duplicate`` and ``drop`` repeat or lose ``length`` bytes; ``reorder`` swaps
            them with as many that follow. ``swallow`` loses everything from there on. ``delay`` forwards nothing for
            ``seconds``, ``stall`` until the fault is disarmed; then everything follows. ``cut`` ends the connection,
            ``reset`` ends it with a TCP reset.
        toward: The direction of the bytes.
        at: Bytes of the connection before the place, from the arming on.
        length: Bytes that are concerned.
        bit: The bit that ``flip`` changes: 0 to 7.
        seconds: Of a ``delay``.
        messages: Whether ``at`` counts messages, and ``length`` those that are repeated or lost; ``reorder`` swaps two.
            Without a way to split the stream, a message is what one call of ``recv`` returns.
    """

    kind: Kind
    toward: Toward = "upstream"
    at: int = 0
    length: int = 1
    bit: int = 0
    seconds: float = 0.0
    messages: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """Something to do before the bytes that follow are forwarded."""

    kind: Literal["delay", "stall", "cut", "reset"]
    seconds: float = 0.0


class FaultInjector:
    """The armed fault of a proxy. Any thread may call the methods.

    Attributes:
        struck: Set once the fault has struck.
        released: Set unless a stall is to last.
    """

    def __init__(self) -> None:
        self.struck, self.released = threading.Event(), threading.Event()
        self.released.set()
        self.lock = threading.Lock()  # guards what follows, and the streams
        self.fault: Fault | None = None
        self.number = 0  # of the arming

    def arm(self, fault: Fault) -> None:
        """Arms a fault in place of the last one."""
        self.disarm()
        with self.lock:
            self.struck.clear()
            self.released.clear()
            self.fault, self.number = fault, self.number + 1

    def disarm(self) -> None:
        """Ends the fault: a stall is over, and nothing else strikes. ``struck`` is kept."""
        with self.lock:
            self.fault = None
            self.released.set()


class FaultyStream:
    """One direction of one connection.

    Args:
        injector: The faults of the proxy.
        toward: The direction.
        split: Cuts the stream into messages; None: it has none, and faults count bytes.
    """

    def __init__(self, injector: FaultInjector, toward: Toward, split: Split | None = None) -> None:
        self._injector, self._toward, self._split = injector, toward, split
        self._number = 0  # of the arming that is counted
        self._seen = 0
        self._effect: _Effect | None = None

    def feed(self, data: bytes) -> Iterator[bytes | Action]:
        """Yields what to forward for ``data``, and what to do in between."""
        for message in self._split(data) if self._split else (data,):
            with self._injector.lock:
                steps = self._pass(message)
            yield from steps

    def end(self) -> bytes:
        """Returns the bytes that are held back when the stream ends."""
        return self._effect.held if self._effect else b""

    def _pass(self, data: bytes) -> list[bytes | Action]:
        injector, fault = self._injector, self._injector.fault
        if fault is None or fault.toward != self._toward:
            held, self._effect = self.end(), None
            return [held + data]
        if self._number != injector.number:
            self._number, self._seen, self._effect = injector.number, 0, None
        if self._effect is not None:
            return self._effect.feed(data)
        size = 1 if fault.messages else len(data)
        before, self._seen = self._seen, self._seen + size
        if injector.struck.is_set() or self._seen <= fault.at:
            return [data]
        injector.struck.set()
        at = 0 if fault.messages else fault.at - before
        self._effect = _Effect(fault)
        steps = self._effect.feed(data[at:])
        if steps and isinstance(steps[0], bytes):
            return [data[:at] + steps[0], *steps[1:]]  # in one piece, as it came
        return [data[:at], *steps] if at else steps


class _Effect:
    """The effect of a fault on the bytes of its connection, from its place on."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._left = fault.length  # bytes or messages that are still concerned
        self._begun = False
        self.held = b""

    def feed(self, data: bytes) -> list[bytes | Action]:
        kind = self._fault.kind
        if kind in ("cut", "reset", "swallow"):
            return [] if kind == "swallow" else [Action(kind)]
        if kind in ("stall", "delay"):
            first, self._begun = not self._begun, True
            return [Action(kind, self._fault.seconds), data] if first else [data]
        if self._left <= 0:
            return [data]
        if kind == "flip":
            self._left = 0
            return [bytes([data[0] ^ 1 << self._fault.bit]) + data[1:]]
        return self._repeat_or_lose(data) if kind != "reorder" else self._swap(data)

    def _repeat_or_lose(self, data: bytes) -> list[bytes | Action]:
        taken, rest = self._take(data)
        if self._fault.kind == "drop":
            return [rest] if rest else []
        self.held += taken
        if self._left:
            return [taken]
        again, self.held = self.held, b""
        return [taken + again + rest]

    def _swap(self, data: bytes) -> list[bytes | Action]:
        length = self._fault.length
        if self._fault.messages:
            if not self.held:
                self.held = data
                return []
            first, self.held, self._left = self.held, b"", 0
            return [data + first]
        self.held += data
        if len(self.held) < 2 * length:
            return []
        all_, self.held, self._left = self.held, b"", 0
        return [all_[length : 2 * length] + all_[:length] + all_[2 * length :]]

    def _take(self, data: bytes) -> tuple[bytes, bytes]:
        """Returns the bytes that are concerned, and the rest."""
        if self._fault.messages:
            self._left -= 1
            return data, b""
        taken, rest = data[: self._left], data[self._left :]
        self._left -= len(taken)
        return taken, rest
