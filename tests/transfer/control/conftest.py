"""Control planes that share one loop and one clock, and plain sockets as their peers."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from embferry.transfer.control.connection import Connection
from embferry.transfer.control.contract import Received, Unreachable
from embferry.transfer.control.endpoint import host_and_port
from embferry.transfer.control.framing import HEADER, frame
from embferry.transfer.control.handshake import Handshake
from embferry.transfer.control.limits import ControlLimits
from embferry.transfer.control.sockets import SocketControl
from embferry.transports.net.loop import Loop
from embferry.trust import greeting
from embferry.trust.greeting import Channel, Role
from tests.trust import raw

SECONDS = 60.0
"""Longest wait for an event; far longer than any takes."""

HELLO = frame(Handshake().first())


STEP_S = 0.01


class ClockedLoop(Loop):
    """A loop whose clock moves only when it is told to, so that a busy machine lets no time limit expire."""

    def __init__(self) -> None:
        self.time = 1000.0
        super().__init__()

    def now(self) -> float:
        return self.time


class Net:
    """Control planes on one loop.

    Attributes:
        events: Everything that each plane has polled.
    """

    def __init__(self) -> None:
        self.loop = ClockedLoop()
        self.events: dict[SocketControl, list[Received | Unreachable]] = defaultdict(list)
        self.sockets: list[socket.socket] = []

    def plane(self, host: str | None = None, port: int = 0, **limits: float) -> SocketControl:
        plane = SocketControl(self.loop, host, port, limits=ControlLimits(**limits))  # type: ignore[arg-type]
        self.events[plane] = []
        return plane

    def server(self, **limits: float) -> SocketControl:
        return self.plane("127.0.0.1", **limits)

    def step(self, timeout_s: float = 0.02) -> None:
        """Runs the loop once, a little later, and polls every plane."""
        self.loop.time += STEP_S
        self.loop.run_once(timeout_s)
        for plane, events in self.events.items():
            events += plane.poll()

    def until(self, condition: Callable[[], object]) -> None:
        """Runs the loop until ``condition`` holds."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.step()

    def advance(self, seconds: float) -> None:
        """Moves the clock forward and lets everything that is then due happen."""
        self.loop.time += seconds
        for _ in range(5):
            self.step(0)

    def data(self, plane: SocketControl) -> list[bytes]:
        """Returns the frames that ``plane`` has received."""
        return [event.data for event in self.events[plane] if isinstance(event, Received)]

    def serve(self, plane: SocketControl, *frames: bytes) -> None:
        """Says that transfers use the connections over which ``frames`` have come."""
        for event in self.events[plane]:
            if isinstance(event, Received) and event.data in frames:
                plane.serves(event.peer)

    def gone(self, plane: SocketControl) -> list[Unreachable]:
        """Returns the peers that ``plane`` has lost."""
        return [event for event in self.events[plane] if isinstance(event, Unreachable)]

    def raw(self, plane: SocketControl, data: bytes = HELLO, source: str = "127.0.0.1") -> socket.socket:
        """Returns a plain connection to ``plane`` that has sent ``data``; a hello comes after a greeting."""
        sock = socket.create_connection(host_and_port(plane.endpoint), source_address=(source, 0))
        self.sockets.append(sock)
        sock.settimeout(SECONDS)
        sock.sendall((raw.hello(Channel.CONTROL) if data.startswith(HELLO) else b"") + data)
        return sock

    def closed(self, sock: socket.socket) -> bool:
        """Returns whether the other end has closed a plain connection, reading all that it has sent."""
        sock.setblocking(False)
        try:
            while sock.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        return True

    def small_buffer(self, connection: Connection | None) -> Connection:
        """Lets the kernel buffer little of what ``connection`` sends, so that a peer that does not read shows soon."""
        assert connection is not None
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        return connection

    def listener(self) -> tuple[socket.socket, str]:
        """Returns a plain listening socket and its endpoint."""
        reserved = socket.socket()  # no other program gets the port when a test closes the listener
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        sock = socket.create_server(reserved.getsockname())
        self.sockets += reserved, sock
        return sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}"

    def accept(self, listener: socket.socket) -> socket.socket:
        """Accepts the next connection and greets the peer, running the loop meanwhile."""
        listener.setblocking(False)
        found: list[socket.socket] = []

        def accepted() -> bool:
            with contextlib.suppress(BlockingIOError):
                found.append(listener.accept()[0])
            return bool(found)

        self.until(accepted)
        self.sockets.append(found[0])
        found[0].sendall(raw.hello(Channel.CONTROL, Role.ACCEPTOR))
        self.read(found[0], greeting.HELLO.size)
        return found[0]

    def read(self, sock: socket.socket, count: int) -> bytes:
        """Returns the next ``count`` bytes on a plain connection, running the loop meanwhile."""
        sock.setblocking(False)
        got = b""

        def whole() -> bool:
            nonlocal got
            with contextlib.suppress(BlockingIOError):
                got += sock.recv(count - len(got))
            return len(got) == count

        self.until(whole)
        sock.setblocking(True)
        return got

    def read_frame(self, sock: socket.socket) -> bytes:
        """Returns the next payload on a plain connection, running the loop meanwhile."""
        sock.setblocking(False)
        got = b""

        def whole() -> bool:
            nonlocal got
            need = HEADER.size if len(got) < HEADER.size else HEADER.size + HEADER.unpack_from(got)[0]
            with contextlib.suppress(BlockingIOError):
                if len(got) < need:
                    got += sock.recv(need - len(got))
            return len(got) >= HEADER.size and len(got) == HEADER.size + HEADER.unpack_from(got)[0]

        self.until(whole)
        return got[HEADER.size :]

    def close(self) -> None:
        for plane in self.events:
            plane.close()
        for sock in self.sockets:
            sock.close()
        self.loop.close()


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()
