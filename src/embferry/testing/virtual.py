"""Whole managers in virtual time: a clock, wires and threads that exist only as a queue of events.

A :class:`VirtualWorld` runs any number of managers on one thread. Nothing happens but through its queue, whose order a
random number generator decides, so that a seed is a story that can be told again. Give every manager a
:meth:`VirtualWorld.runtime` and transports that need no thread (:class:`~embferry.InMemoryTransport`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from embferry.protocol.errors import PeerGone
from embferry.transfer.control.contract import ControlPlane, Received, Unreachable
from embferry.transfer.runtime import Runtime, Turn


@dataclass
class Weather:
    """Faults of the wires, which a frame may meet.

    Attributes:
        loss: Probability that a frame is lost.
        repeat: Probability that a frame arrives twice.
        delay: Longest time that a frame takes, in seconds; frames overtake each other.
    """

    loss: float = 0.0
    repeat: float = 0.0
    delay: float = 0.01


class VirtualWorld:
    """A clock and a queue of events.

    Args:
        seed: Of everything that is drawn.

    Attributes:
        now: The time, in seconds.
        weather: What happens to frames; it may be changed at any time.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.weather = Weather()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._listeners: dict[str, VirtualControl] = {}
        self._ports = itertools.count(1)

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Queues a call."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), call))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass. Returns whether ``until`` came true within ``seconds``."""
        end = self.now + seconds
        while not until():
            if not self._events or self._events[0][0] > end:
                self.now = end
                return until()
            self.now, _, call = heapq.heappop(self._events)
            call()
        return True

    def runtime(self, *, listens: bool = False) -> VirtualRuntime:
        """Returns the surroundings of one manager."""
        endpoint = f"tcp://10.0.0.1:{next(self._ports)}" if listens else ""
        runtime = VirtualRuntime(self, endpoint)
        if listens:
            self._listeners[endpoint] = runtime.control
        return runtime

    def transmit(self, sender: VirtualControl, peer: Hashable, data: bytes) -> None:
        """Carries a frame, or loses it."""
        copies = 0 if self.random.random() < self.weather.loss else 1 + (self.random.random() < self.weather.repeat)
        for _ in range(copies):
            self.later(self.random.uniform(0, self.weather.delay), lambda: self._deliver(sender, peer, data))

    def _deliver(self, sender: VirtualControl, peer: Hashable, data: bytes) -> None:
        if isinstance(peer, str):
            listener = self._listeners.get(peer)
            if listener is None or listener.is_closed:
                error = PeerGone(f"nothing listens at {peer}")
                sender.arrived(Unreachable(peer, error))
                return
            listener.arrived(Received((id(sender), sender, peer), data))
        elif isinstance(peer, tuple):
            peer[1].arrived(Received(peer[2], data))


class VirtualControl(ControlPlane):
    """Frames through a :class:`VirtualWorld`."""

    def __init__(self, world: VirtualWorld, endpoint: str, wake: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self.is_closed = False
        self._world, self._wake = world, wake
        self._events: list[Received | Unreachable] = []
        self._dropped_frames = 0

    @property
    def dropped_frames(self) -> int:
        return self._dropped_frames

    def arrived(self, event: Received | Unreachable) -> None:
        """The world has something for this end."""
        if not self.is_closed:
            self._events.append(event)
            self._wake()

    def send(self, peer: Hashable, data: bytes) -> None:
        if self.is_closed:
            self._dropped_frames += 1
        else:
            self._world.transmit(self, peer, data)

    def poll(self) -> list[Received | Unreachable]:
        events, self._events = self._events, []
        return events

    def forget(self, peer: Hashable) -> None:
        pass

    def close(self, linger_s: float = 0.2) -> None:
        self.is_closed = True


@dataclass(eq=False)
class VirtualRuntime(Runtime):
    """The surroundings of one manager in a :class:`VirtualWorld`.

    Attributes:
        stopped: Whether the process is stopped, as by SIGSTOP: it makes no turn until this is unset and it is
            woken.
        killed: Whether the process has died: it makes no turn again.
    """

    world: VirtualWorld
    endpoint: str
    stopped: bool = False
    killed: bool = False
    control: VirtualControl = field(init=False)
    _turn: Turn | None = None
    _queued_at: float | None = None

    def __post_init__(self) -> None:
        self.control = VirtualControl(self.world, self.endpoint, self.wake)

    def now(self) -> float:
        return self.world.now

    def start(self, turn: Turn) -> None:
        self._turn = turn
        self.wake()

    def wake(self) -> None:
        self._queue(self.world.now)

    def run_callback(self, call: Callable[[], None]) -> None:
        self.world.later(self.world.random.uniform(0, 0.01), call)

    def stop(self) -> None:
        if self._turn is not None and not self.killed:
            self._turn()
        self._turn = None
        self.control.close()

    def kill(self) -> None:
        """Ends the process at once, without a message."""
        self.killed = True
        self.control.close()

    def _queue(self, at: float) -> None:
        """Queues a turn, unless one is queued that comes no later."""
        if self._queued_at is None or at < self._queued_at:
            self._queued_at = at
            self.world.later(max(0.0, at - self.world.now), lambda: self._run(at))

    def _run(self, at: float) -> None:
        if self._queued_at != at:
            return  # an earlier one has replaced it
        self._queued_at = None
        if self._turn is None or self.stopped or self.killed:
            return
        due = self._turn()
        if due is not None:
            self._queue(max(due, self.world.now))
