"""Peers that have finished the handshake of a control port and go on sending allowed messages for no transfer."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from types import TracebackType

from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.messages import Frame, Open, TransportAddress, encode
from embferry.transfer.control.endpoint import host_and_port
from embferry.transfer.control.framing import frame
from embferry.transfer.control.handshake import Handshake
from embferry.trust.greeting import Channel
from tests.strangers.raw_http import SECONDS
from tests.trust.raw import hello

PAUSE_S = 0.05
GEOMETRY = Geometry(Layout((Field("input_embeddings", "float32", 64),)), 4, 8)


class BusyPeers:
    """``count`` connections that each ask for rooms that are not open, many times a second. A context manager.

    A connection that is closed by the other end is made again at once.

    Attributes:
        rounds: How often every connection has sent a message.
        closed: Connections that the other end has closed.
    """

    def __init__(self, endpoint: str, count: int) -> None:
        self._address = host_and_port(endpoint)
        self.rounds = self.closed = 0
        self._over = threading.Event()
        self._socks = [self._connect() for _ in range(count)]
        self._thread = threading.Thread(target=self._run, name="busy peers")

    def __enter__(self) -> BusyPeers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        for sock in self._socks:
            sock.close()

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, SECONDS)
        sock.sendall(hello(Channel.CONTROL) + frame(Handshake().first()))
        sock.setblocking(False)
        return sock

    def _run(self) -> None:
        while not self._over.is_set():
            for number, sock in enumerate(self._socks):
                if not _talk(sock):
                    self.closed += 1
                    sock.close()
                    self._socks[number] = self._connect()
            self.rounds += 1
            self._over.wait(PAUSE_S)


def _talk(sock: socket.socket) -> bool:
    """Asks for a room, and reads the answers. Returns whether the connection is still open."""
    room, session = secrets.randbits(62), secrets.randbits(62) + 1
    transports = (TransportAddress("tcp", b"nowhere"),)
    body = Open(room, 1, (1, 1), GEOMETRY, "busy", transports, 0)
    try:
        with contextlib.suppress(BlockingIOError):
            sock.sendall(frame(encode(Frame(1, session, 0, body))))
            while sock.recv(1 << 16):
                pass
            return False
    except OSError:
        return False
    return True
