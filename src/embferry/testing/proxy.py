"""A TCP proxy on the loopback interface that cuts, stalls, slows, delays or swallows on request, and counts bytes.

It also does what :class:`~.stream_faults.Fault` describes, once, at a chosen byte or message.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

from embferry.testing.stream_faults import Action, Fault, FaultInjector, FaultyStream, Split, Toward

__all__ = ["ChaosProxy"]

HOST = "127.0.0.1"
RECEIVE_BYTES = 1 << 18
CONNECT_S = 5.0
SLICES_PER_S = 20  # in which a slowed connection is forwarded
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 seconds


class ChaosProxy:
    """Forwards bytes between clients and an upstream server. A context manager; it leaves no thread and no socket.

    Args:
        upstream: Port on this host to which connections are forwarded; may be set later.
        cut_after: Bytes after which a connection is cut, in the direction of ``toward``; 0 for no cut.
        toward: The direction whose bytes count towards ``cut_after``.
        times: Number of connections that are cut; later ones are not.
        dies: Whether connections are refused after the last cut, as by :meth:`refuse`.
        swallow_after: Bytes over all connections, in the direction of ``toward``, after which everything in that
            direction is taken and dropped, also on new connections: a link that is dead and does not say so. None:
            nothing is dropped.
        bytes_per_s: Bytes of each connection that are forwarded in a second, in either direction; 0: no limit.
        delay_s: Seconds for which bytes are held back, in either direction.
        listen: Address and port to listen at; port 0: any free one.
        split: Makes, for one direction of one connection, the function that cuts the stream into messages. Each is
            forwarded when it is complete. Without one, bytes are forwarded as they come.

    Attributes:
        port: The port that clients connect to.
        to_clients: Bytes forwarded to the client, for each connection.
        to_upstream: Bytes forwarded to the upstream server, for each connection.
        cuts: Number of connections cut by ``cut_after``.
        swallowed: Bytes dropped so far by ``swallow_after``.
    """

    def __init__(
        self,
        upstream: int = 0,
        *,
        cut_after: int = 0,
        toward: Literal["clients", "upstream"] = "clients",
        times: int = 1,
        dies: bool = False,
        swallow_after: int | None = None,
        bytes_per_s: int = 0,
        delay_s: float = 0.0,
        listen: tuple[str, int] = (HOST, 0),
        split: Callable[[Toward], Split | None] = lambda toward: None,
    ) -> None:
        self.upstream = upstream
        self.to_clients: list[int] = []
        self.to_upstream: list[int] = []
        self.cuts = self.swallowed = 0
        self._swallow_after, self._bytes_per_s, self._delay_s = swallow_after, bytes_per_s, delay_s
        self._ending = threading.Event()
        self._split, self._injector = split, FaultInjector()
        self._cut_after, self._times, self._dies = cut_after, times, dies
        self._bounded = self.to_clients if toward == "clients" else self.to_upstream
        self._going = threading.Event()
        self._going.set()
        self._lock = threading.Lock()  # guards the counts and what follows
        self._refuses = False
        self._connections: set[_Connection] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(listen)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="chaos-proxy")

    def __enter__(self) -> ChaosProxy:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.refuse()
        self.resume()
        self.disarm()
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

    def arm(self, fault: Fault) -> None:
        """Lets a fault strike one connection, once. It takes the place of an earlier one."""
        self._injector.arm(fault)

    def disarm(self) -> None:
        """Ends the armed fault. Its connection works again, unless bytes were lost."""
        self._injector.disarm()

    @property
    def struck(self) -> threading.Event:
        """Set once the fault that was armed last has struck."""
        return self._injector.struck

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
        slice_bytes = max(1, self._bytes_per_s // SLICES_PER_S) if self._bytes_per_s else RECEIVE_BYTES
        line = _DelayLine(there, self._delay_s, self._ending) if self._delay_s else None
        forward = line.send if line else there.sendall
        toward: Toward = "clients" if counts is self.to_clients else "upstream"
        stream = FaultyStream(self._injector, toward, self._split(toward))
        try:
            while (data := here.recv(slice_bytes)) and not connection.is_cut:
                self._going.wait()
                if self._bytes_per_s:
                    self._ending.wait(len(data) / self._bytes_per_s)
                data, cuts = self._count(number, counts, data)
                for step in stream.feed(data) if data else ():
                    if isinstance(step, bytes):
                        forward(step)
                    else:
                        self._do(step, connection)
                if cuts:
                    if self._dies and cuts == self._times:
                        self.refuse()
                    connection.cut()
            if connection.is_cut:
                return
            if held := stream.end():
                forward(held)
            if line:
                line.end()
            there.shutdown(socket.SHUT_WR)
        except OSError:
            connection.cut()
        finally:
            if line:
                line.end()

    def _do(self, action: Action, connection: _Connection) -> None:
        match action.kind:
            case "delay":
                self._ending.wait(action.seconds)
            case "stall":
                self._injector.released.wait()
            case "cut":
                connection.cut()
            case "reset":
                connection.reset()

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
            if counts is self._bounded and self._swallow_after is not None:
                left = max(0, self._swallow_after - sum(counts))
                self.swallowed += max(0, len(data) - left)
                data = data[:left]
            counts[number] += len(data)
            return data, cuts


class _DelayLine:
    """Holds bytes back before it forwards them, on a thread of its own."""

    def __init__(self, there: socket.socket, delay_s: float, ending: threading.Event) -> None:
        self._there, self._delay_s, self._ending = there, delay_s, ending
        self._held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="chaos-proxy-delay")
        self._thread.start()

    def send(self, data: bytes) -> None:
        self._held.put((time.monotonic() + self._delay_s, data))

    def end(self) -> None:
        """Forwards the rest, and ends the thread. Idempotent."""
        self._held.put((0.0, b""))
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the connection has been cut; the other side notices
            while True:
                due, data = self._held.get()
                if not data:
                    return
                self._ending.wait(max(0.0, due - time.monotonic()))
                self._there.sendall(data)


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

    def reset(self) -> None:
        """Ends both connections with a TCP reset, once neither direction is being forwarded any more."""
        with self._lock:
            self.is_cut = True
            for sock in (self.client, self.server):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    sock.shutdown(socket.SHUT_RD)  # wakes the thread that receives, and sends nothing

    def close(self) -> None:
        with self._lock:
            self.client.close()
            self.server.close()
