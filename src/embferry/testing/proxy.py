"""A TCP proxy on the loopback interface that cuts, stalls or refuses connections on request, and counts bytes."""

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
    """Forwards bytes between clients and an upstream server. A context manager; it leaves no thread and no socket.

    Args:
        upstream: Port on this host to which connections are forwarded; may be set later.
        cut_after: Bytes after which a connection is cut, in the direction of ``toward``; 0 for no cut.
        toward: The direction whose bytes count towards ``cut_after``.
        times: Number of connections that are cut; later ones are not.
        dies: Whether connections are refused after the last cut, as by :meth:`refuse`.

    Attributes:
        port: The port that clients connect to.
        to_clients: Bytes forwarded to the client, for each connection.
        to_upstream: Bytes forwarded to the upstream server, for each connection.
        cuts: Number of connections cut by ``cut_after``.
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
        self._lock = threading.Lock()  # guards the counts and what follows
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
        """Stops forwarding. Connections stay open, and new ones are accepted."""
        self._going.clear()

    def resume(self) -> None:
        """Resumes forwarding after :meth:`stall`; no byte is lost."""
        self._going.set()

    def cut(self) -> None:
        """Cuts all open connections."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()

    def refuse(self) -> None:
        """Cuts all open connections and refuses new ones from now on."""
        with self._lock:
            self._refuses = True
        with contextlib.suppress(OSError):  # it has been shut down before
            self._listener.shutdown(socket.SHUT_RDWR)  # the port stays taken
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
            self._start(_Connection(client, server))

    def _start(self, connection: _Connection) -> None:
        with self._lock:
            number = len(self.to_clients)
            self.to_clients.append(0)
            self.to_upstream.append(0)
            self._connections.add(connection)
            refused = self._refuses
        if refused:
            connection.cut()
        self._threads.append(threading.Thread(target=self._serve, args=(connection, number)))
        self._threads[-1].start()

    def _serve(self, connection: _Connection, number: int) -> None:
        client, server = connection.client, connection.server
        back = threading.Thread(target=self._forward, args=(connection, number, server, client, self.to_clients))
        back.start()
        self._forward(connection, number, client, server, self.to_upstream)
        back.join()
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _forward(
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

    def _count(self, number: int, counts: list[int], data: bytes) -> tuple[bytes, int]:
        """Counts ``data``; returns what of it to forward, and the number of the cut that follows (0: none).

        It is counted before it is forwarded, so that a test that has received it finds it counted.
        """
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
    """The two sockets of a connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.is_cut = False  # bytes that its sockets still hold are not forwarded
        self._lock = threading.Lock()  # a socket that is being shut down must not be closed, nor its number reused

    def cut(self) -> None:
        with self._lock:
            self.is_cut = True
            for sock in (self.client, self.server):
                with contextlib.suppress(OSError):  # it has ended before
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self.client.close()
            self.server.close()
