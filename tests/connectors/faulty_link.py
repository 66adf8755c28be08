"""The data connections between a producer and a consumer, which a test can cut and damage.

A consumer that listens on one loopback address and advertises another makes its producers connect here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

LISTENS, ADVERTISES = "127.0.0.2", "127.0.0.3"
TRANSPORT = {"transports": ["tcp"], "host": LISTENS, "advertise": ADVERTISES}
"""A consumer's settings."""
RECEIVE_BYTES = 4096
LISTENING = "0A"

Fault = Callable[[int, bytearray], bool]
"""Takes the bytes that a connection has carried and the next ones, which it may change. Returns False to cut it."""


def ports_at(address: str) -> set[int]:
    """Returns the ports on which any process listens, from the kernel's list."""
    name = socket.inet_aton(address)[::-1].hex().upper()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1][9:], 16) for row in rows if row[1].startswith(name + ":") and row[3] == LISTENING}


class FaultyLink:
    """Carries bytes from ``advertises:port`` to ``listens:port`` and back.

    Attributes:
        carried: Bytes that each connection has carried to the consumer.
    """

    def __init__(self, port: int, advertises: str = ADVERTISES, listens: str = LISTENS) -> None:
        self._port, self._listens = port, listens
        self.carried: list[int] = []
        self.fault: Fault = no_fault
        self._listener = socket.create_server((advertises, port))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def new(self, fault: Fault | None = None) -> None:
        """Ends the existing connections; later ones have this fault."""
        self.fault = fault or no_fault
        self.carried.clear()
        self._cut()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for end in self._sockets:
            end.close()

    def _cut(self) -> None:
        self._shut_down(*self._sockets)

    def _accept(self) -> None:
        while True:
            try:
                producer, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                consumer = socket.create_connection((self._listens, self._port))
            except OSError:  # it was killed, and the producer has not noticed yet
                producer.close()
                continue
            ends = (producer, consumer)
            self._sockets += ends
            self.carried.append(0)
            for carry in (self._forth, self._back):
                self._threads.append(threading.Thread(target=carry, args=(len(self.carried) - 1, *ends)))
                self._threads[-1].start()

    def _forth(self, number: int, producer: socket.socket, consumer: socket.socket) -> None:
        carried, fault = self.carried, self.fault
        with contextlib.suppress(OSError):  # cut
            while data := bytearray(producer.recv(RECEIVE_BYTES)):
                if not fault(carried[number], data):
                    break
                carried[number] += len(data)
                consumer.sendall(data)
        self._shut_down(producer, consumer)

    def _back(self, number: int, producer: socket.socket, consumer: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := consumer.recv(RECEIVE_BYTES):
                producer.sendall(data)
        self._shut_down(producer, consumer)

    def _shut_down(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):  # it has ended by itself
                end.shutdown(socket.SHUT_RDWR)


def no_fault(before: int, data: bytearray) -> bool:
    return True
