"""A TCP relay on the loopback that may change what it carries."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

HOST = "127.0.0.1"
RECEIVE_BYTES = 1 << 18
CONNECT_S = 5.0

Change = Callable[[bytes], bytes]


class Relay:
    """Carries bytes between its clients and port ``upstream`` of this host. A context manager; no thread and no socket
    is left behind it.

    :param change: makes of what a client sends what arrives; called by one thread at a time for each connection.
    """

    def __init__(self, upstream: int, change: Change) -> None:
        self._upstream, self._change = upstream, change
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="relay")
        self._accepting.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._ended = True
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):  # its peer was first
                sock.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        for sock in sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if not self._ended:
                    raise
                return
            try:
                server = socket.create_connection((HOST, self._upstream), CONNECT_S)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                ended = self._ended
                self._sockets += [client, server]
            if ended:
                client.close()
                server.close()
                return
            for ways in ((client, server, self._change), (server, client, bytes)):
                self._threads.append(threading.Thread(target=_carry, args=ways, name="relay"))
                self._threads[-1].start()


def _carry(here: socket.socket, there: socket.socket, change: Change) -> None:
    try:
        while data := here.recv(RECEIVE_BYTES):
            there.sendall(change(data))
        there.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (here, there):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
