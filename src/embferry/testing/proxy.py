"""A TCP proxy on the loopback that cuts, stalls and dies when it is told to, and counts what it carries."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

__all__ = ["ChaosProxy"]

HOST = "127.0.0.1"
RECEIVE_BYTES = 1 << 18
CONNECT_S = 5.0


class ChaosProxy:
    """Carries bytes between its clients and :attr:`upstream`, faithfully but for what follows. A context manager; no
    thread and no socket is left behind it.

    :param upstream: the port of this host that connections lead to; it may be set later.
    :param cut_after: bytes one way of a connection may carry; with the last of them the connection is cut. 0: all.
    :param toward: which way that is.
    :param times: so many connections are cut; later ones are whole.
    :param dies: with the last cut it begins to refuse, as after :meth:`refuse`.

    Attributes:
        port: where clients connect.
        to_clients, to_upstream: bytes that were passed on, of each connection.
        cuts: connections that :attr:`cut_after` has ended.
    """

    def __init__(
        self,
        upstream: int = 0,
        *,
        cut_after: int = 0,
        toward: Literal["clients", "upstream"] = "clients",
        times: int = 1,
        dies: bool = False,
    ) -> None:
        self.upstream = upstream
        self.to_clients: list[int] = []
        self.to_upstream: list[int] = []
        self.cuts = 0
        self._cut_after, self._times, self._dies = cut_after, times, dies
        self._bounded = self.to_clients if toward == "clients" else self.to_upstream
        self._going = threading.Event()
        self._going.set()
        self._lock = threading.Lock()  # of the counts and of what follows
        self._refuses = False
        self._connections: set[_Connection] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="chaos-proxy")

    def __enter__(self) -> ChaosProxy:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.resume()
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def stall(self) -> None:
        """Passes nothing on from now on. Connections stay, and new ones are taken."""
        self._going.clear()

    def resume(self) -> None:
        """Goes on after :meth:`stall`; nothing has been lost."""
        self._going.set()

    def cut(self) -> None:
        """Ends the connections that are there."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()

    def refuse(self) -> None:
        """Is dead from now on: new connections are refused, those that are there are cut."""
        with self._lock:
            self._refuses = True
        with contextlib.suppress(OSError):  # it has been before
            self._listener.shutdown(socket.SHUT_RDWR)  # the port stays ours, so nobody else answers on it
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if not self._refuses:
                    raise
                return
            try:
                server = socket.create_connection((HOST, self.upstream), CONNECT_S)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self._join(_Connection(client, server))

    def _join(self, connection: _Connection) -> None:
        with self._lock:
            number = len(self.to_clients)
            self.to_clients.append(0)
            self.to_upstream.append(0)
            self._connections.add(connection)
            refused = self._refuses
        if refused:
            connection.cut()
        ways = (
            (connection.server, connection.client, self.to_clients),
            (connection.client, connection.server, self.to_upstream),
        )
        for way in ways:
            self._threads.append(threading.Thread(target=self._carry, args=(connection, number, *way)))
            self._threads[-1].start()

    def _carry(
        self, connection: _Connection, number: int, here: socket.socket, there: socket.socket, counts: list[int]
    ) -> None:
        try:
            while (data := here.recv(RECEIVE_BYTES)) and not connection.is_cut:
                self._going.wait()
                data, cuts = self._count(number, counts, data)
                there.sendall(data)
                if cuts:
                    if self._dies and cuts == self._times:
                        self.refuse()
                    connection.cut()
            there.shutdown(socket.SHUT_WR)
        except OSError:
            connection.cut()
        if connection.leave():
            with self._lock:
                self._connections.discard(connection)

    def _count(self, number: int, counts: list[int], data: bytes) -> tuple[bytes, int]:
        """What of ``data`` to pass on, and which cut comes then (0: none). Counted before it is passed on, so that who
        has got it finds it counted."""
        with self._lock:
            cuts = 0
            if counts is self._bounded and self._cut_after and self.cuts < self._times:
                left = self._cut_after - counts[number]
                if len(data) >= left:
                    data = data[:left]
                    self.cuts = cuts = self.cuts + 1
            counts[number] += len(data)
            return data, cuts


class _Connection:
    """Its two sockets, closed by the second of the two threads that carry between them."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.is_cut = False  # what its sockets still hold is passed on no more
        self._lock = threading.Lock()
        self._users = 2

    def cut(self) -> None:
        with self._lock:
            self.is_cut = True
            if self._users:
                for sock in (self.client, self.server):
                    with contextlib.suppress(OSError):  # it has ended by itself
                        sock.shutdown(socket.SHUT_RDWR)

    def leave(self) -> bool:
        """Whether that was the second."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self.client.close()
                self.server.close()
            return not self._users
