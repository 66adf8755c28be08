"""Whole managers in virtual time: a clock, wires and threads that exist only as a queue of events.

A :class:`VirtualWorld` runs any number of managers on one thread. Everything happens through its queue. A random
number generator decides the order of the queue, so the same seed tells the same story again. Give every manager a
:meth:`VirtualWorld.runtime` and transports that need no thread (:class:`~.virtual_transport.VirtualTransport`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from embferry.protocol.errors import PeerGone
from embferry.transfer.control.contract import ControlPlane, Received, Unreachable
from embferry.transfer.runtime import Runtime, Turn


@dataclass
class Weather:
    """Faults of the wires and delays of the threads.

    Attributes:
        loss: Probability that a frame is lost.
        repeat: Probability that a frame arrives twice.
        delay: Longest time that a frame or a write takes, in seconds; frames overtake each other.
        latency: Longest time that a thread takes to wake up, in seconds.
    """

    loss: float = 0.0
    repeat: float = 0.0
    delay: float = 0.01
    latency: float = 0.001


class VirtualWorld:
    """A clock and a queue of events.

    Args:
        seed: Of everything that is drawn.
        most_events: After so many, :meth:`run` raises: something repeats without end.

    Attributes:
        now: The time, in seconds.
        weather: What happens to frames; it may be changed at any time.
        cut: Pairs of processes, by name, that are separated: frames between them are lost, writes wait.
        processes: The name of the process behind each handle of a transport.
        faults: Exceptions that left a turn or a callback, which is a bug, and violations that a part of the world saw.
    """

    def __init__(self, seed: int, most_events: int = 1_000_000) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.weather = Weather()
        self.cut: set[frozenset[str]] = set()
        self.processes: dict[bytes, str] = {}
        self.faults: list[Exception] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._left = most_events
        self._listeners: dict[str, VirtualControl] = {}
        self._ports = itertools.count(1)

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Queues a call."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), call))

    def soon(self) -> float:
        """Returns how long a thread takes to wake up, in seconds."""
        return self.random.uniform(0, self.weather.latency)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass. Returns whether ``until`` came true within ``seconds``.

        Code that runs in the world may call it to take its time: its own thread does nothing else meanwhile.
        """
        end = self.now + seconds
        while not until():
            if not self._events or self._events[0][0] > end:
                self.now = max(self.now, end)
                return until()
            self._left -= 1
            if self._left < 0:
                raise AssertionError("too many events: something repeats without end")
            time, _, call = heapq.heappop(self._events)
            self.now = max(self.now, time)
            call()
        return True

    def runtime(self, *, listens: bool = False, name: str = "", endpoint: str = "") -> VirtualRuntime:
        """Returns the surroundings of one manager.

        Args:
            listens: Whether peers can dial it.
            name: Of the process, for :attr:`cut`.
            endpoint: Where it listens, for example in place of a process that has died; empty: a new one.
        """
        if listens and not endpoint:
            endpoint = f"tcp://10.0.0.1:{next(self._ports)}"
        runtime = VirtualRuntime(self, endpoint, name or endpoint)
        if listens:
            self._listeners[endpoint] = runtime.control
        return runtime

    def are_cut(self, one: str, other: str) -> bool:
        """Returns whether two processes are separated."""
        return frozenset((one, other)) in self.cut

    def transmit(self, sender: VirtualControl, peer: Hashable, data: bytes) -> None:
        """Carries a frame, or loses it."""
        copies = 0 if self.random.random() < self.weather.loss else 1 + (self.random.random() < self.weather.repeat)
        for _ in range(copies):
            self.later(self.random.uniform(0, self.weather.delay), lambda: self._deliver(sender, peer, data))

    def reset(self, dialler: VirtualControl, endpoint: str) -> None:
        """Ends the connection of two processes. The next frame makes a new one."""
        listener = self._listeners.get(endpoint)
        accepted = dialler.connections.pop(endpoint, None)
        if listener is not None and accepted is not None:
            accepted.is_open = False
            listener.arrived(Unreachable(accepted, PeerGone("the connection has ended")))

    def _deliver(self, sender: VirtualControl, peer: Hashable, data: bytes) -> None:
        if isinstance(peer, str):
            listener = self._listeners.get(peer)
            if listener is None or listener.is_closed:
                sender.connections.pop(peer, None)
                sender.arrived(Unreachable(peer, PeerGone(f"nothing listens at {peer}")))
            elif not self.are_cut(sender.name, listener.name):
                accepted = sender.connections.setdefault(peer, Accepted(sender, peer))
                listener.arrived(Received(accepted, data))
        elif isinstance(peer, Accepted) and peer.is_open and not self.are_cut(sender.name, peer.dialler.name):
            peer.dialler.arrived(Received(peer.endpoint, data))


@dataclass(eq=False)
class Accepted:
    """A connection, as the process that was dialled sees its peer."""

    dialler: VirtualControl
    endpoint: str
    is_open: bool = True


class VirtualControl(ControlPlane):
    """Frames through a :class:`VirtualWorld`.

    Attributes:
        name: Of the process.
        connections: Connections that this end has dialled, by endpoint.
    """

    def __init__(self, world: VirtualWorld, endpoint: str, name: str, wake: Callable[[], None]) -> None:
        self.endpoint, self.name = endpoint, name
        self.is_closed = False
        self.connections: dict[str, Accepted] = {}
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
        for endpoint in list(self.connections):
            self._world.reset(self, endpoint)


@dataclass(eq=False)
class VirtualRuntime(Runtime):
    """The surroundings of one manager in a :class:`VirtualWorld`.

    Attributes:
        name: Of the process.
        killed: Whether the process has died: it makes no turn again.
    """

    world: VirtualWorld
    endpoint: str
    name: str
    stopped: bool = False
    killed: bool = False
    control: VirtualControl = field(init=False)
    _turn: Turn | None = None
    _queued_at: float | None = None
    _in_turn: bool = False
    _callbacks: deque[Callable[[], None]] = field(default_factory=deque)
    _in_callback: bool = False

    def __post_init__(self) -> None:
        self.control = VirtualControl(self.world, self.endpoint, self.name, self.wake)

    def now(self) -> float:
        return self.world.now

    def start(self, turn: Turn) -> None:
        self._turn = turn
        self.wake()

    def wake(self) -> None:
        self._queue(self.world.now + self.world.soon())

    def run_callback(self, call: Callable[[], None]) -> None:
        self._callbacks.append(call)
        if len(self._callbacks) == 1 and not self._in_callback:
            self.world.later(self.world.soon(), self._call_back)

    @property
    def is_own_thread(self) -> bool:
        return self._in_turn

    def stop(self) -> None:
        if self._turn is not None and not self.killed:
            self._one_turn(self._turn)
        self._turn = None
        self.control.close()
        while self._callbacks and not self.killed and not self._in_callback:
            self._call_back()

    def pause(self) -> None:
        """Stops the process, as SIGSTOP does: its threads do nothing until :meth:`resume`."""
        self.stopped = True

    def resume(self) -> None:
        """Continues the process, as SIGCONT does."""
        self.stopped = False
        self.wake()
        if self._callbacks and not self._in_callback:
            self.world.later(self.world.soon(), self._call_back)

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
        if self._queued_at != at or self._in_turn:
            return  # an earlier one has replaced it, or the running one is followed by another
        self._queued_at = None
        if self._turn is None or self.stopped or self.killed:
            return
        due = self._one_turn(self._turn)
        if self._queued_at is not None and self._queued_at <= self.world.now:
            self._queued_at = None  # it came due while this turn ran
            self.wake()
        if due is not None:
            self._queue(max(due, self.world.now) + (self.world.soon() if due <= self.world.now else 0.0))

    def _one_turn(self, turn: Turn) -> float | None:
        self._in_turn = True
        try:
            return turn()
        except Exception as error:
            self.world.faults.append(error)
            raise
        finally:
            self._in_turn = False

    def _call_back(self) -> None:
        """Runs the next callback: one at a time, in their order, as on one thread."""
        if not self._callbacks or self._in_callback or self.stopped or self.killed:
            return
        call = self._callbacks.popleft()
        self._in_callback = True
        try:
            call()
        except Exception as error:
            self.world.faults.append(error)
            raise
        finally:
            self._in_callback = False
        if self._callbacks:
            self.world.later(self.world.soon(), self._call_back)


class VirtualExecutor:
    """Takes the place of a :class:`concurrent.futures.ThreadPoolExecutor` of one thread.

    Attributes:
        broken: Raised by the next :meth:`submit`, as if no thread could be started.
    """

    def __init__(self, world: VirtualWorld) -> None:
        self.broken: Exception | None = None
        self._world = world
        self._calls: deque[Callable[[], None]] = deque()
        self._closed = False

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Queues a call. It must not raise."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        self._calls.append(lambda: call(*arguments))
        self._world.later(self._world.random.uniform(0, self._world.weather.delay), self._next)

    def shutdown(self) -> None:
        """Makes the calls that are left."""
        self._closed = True
        while self._calls:
            self._next()

    def _next(self) -> None:
        if self._calls:
            self._calls.popleft()()
