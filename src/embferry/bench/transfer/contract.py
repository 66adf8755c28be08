"""The interface of a candidate, which moves an embedding from an array of one process to an array of another.

A round:

1. The sending end *stages* it: the embedding is in its array, the request is known.
2. The receiving end *arms*: it knows the request too, and waits.
3. The clock starts in the sending process, which calls :meth:`Sending.send`.
4. The clock stops in the receiving process when :meth:`Receiving.receive` returns: the array may be used.
5. Both *finish*. This is outside the time, but inside the CPU time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Facts = dict[str, Any]
"""A message between the two ends, outside the time."""


class UnavailableError(Exception):
    """The candidate cannot run here; the text says why and what to install."""


class Job(msgspec.Struct, frozen=True):
    """The task of an end."""

    factory: str
    """``module:prefix``; the classes are ``<prefix>Sending`` and ``<prefix>Receiving``."""
    tokens: int
    size: int
    """Bytes of the embedding."""
    options: Facts
    folder: str
    """A folder that both ends see; the coordinator removes it."""
    timeout_s: float


class Link:
    """A pair of connected Unix sockets, on which one end tells the other that something is ready.

    Stands for the message or request that tells it in practice, and costs less.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        connection.settimeout(timeout_s)

    def tell(self) -> None:
        self._connection.sendall(b"!")

    def wait(self) -> None:
        """Waits until the other end tells.

        Raises:
            EOFError: the other end has gone.
            TimeoutError: nothing came in time.
        """
        if not self._connection.recv(1):
            raise EOFError("the other end of this candidate has gone")


class End:
    """One end of a candidate, in a process of its own; made once, used for many rounds.

    Attributes:
        tensor: uint8 ``[job.size]``: the embedding to send, or the array for the one that arrives, which a receiving
            end may replace.
        counted_twice: bytes of memory that are mapped twice, which the kernel counts twice as resident.
        closing: what is called or closed after the last round.
    """

    counted_twice = 0

    def __init__(self, job: Job, link: Link, tensor: Bytes) -> None:
        self.job, self.link, self.tensor, self.closing = job, link, tensor, ExitStack()
        self.setup()

    def setup(self) -> None:
        """Makes what lasts for all rounds."""

    def address(self) -> Facts:
        """Returns what the other end needs in order to connect."""
        return {}

    def connect(self, other: Facts) -> None:
        """Connects to the other end, given its :meth:`address`."""

    def each(self) -> list[list[Bytes]]:
        """Returns every embedding of a round as arrays, one field after another, valid until :meth:`finish`."""
        return [[self.tensor]]

    def finish(self) -> Facts:
        """Releases what the round used, and returns figures of the candidate's own."""
        return {}


class Sending(End):
    def stage(self, number: int) -> Facts:
        """Prepares round ``number`` and returns what the receiving end must know about it."""
        return {}

    def send(self) -> None:
        """Timed. May return before all bytes have left."""
        self.link.tell()


class Receiving(End):
    def arm(self, number: int, staged: Facts) -> None:
        """Learns about round ``number`` before the clock starts."""

    def receive(self) -> None:
        """Timed. Returns when the embedding may be used."""
        self.link.wait()

    def fill(self, read: Callable[[memoryview], int | None]) -> None:
        """Calls ``read`` until the array is full; it takes a buffer and returns how many bytes it wrote there.

        Raises:
            EOFError: the stream ended before the embedding did.
        """
        view, got = memoryview(self.tensor.data), 0
        while got < len(view):
            count = read(view[got:])
            if not count:
                raise EOFError(f"the stream ended after {got} of {len(view)} bytes")
            got += count
