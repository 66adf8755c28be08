"""What a contestant has to be able to do: carry an embedding from a tensor of one process to a tensor of another.

A round goes so. The sending end *stages* it: the embedding is there, the request is known. The receiving end *arms*:
the request is known to it too, it waits. Then the clock starts, in the sending process, and :meth:`Sending.send` is
called; it stops, in the receiving process, when :meth:`Receiving.receive` returns: the tensor may be used. Both
*finish*, outside of the time but not of the CPU time that is counted.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Facts = dict[str, Any]
"""What ends tell each other before the clock starts; JSON."""


class UnavailableError(Exception):
    """The contestant cannot run here; says why and what would help."""


class Job(msgspec.Struct, frozen=True):
    """What an end is made for."""

    contestant: str
    factory: str
    """``module:prefix`` of the classes: ``<prefix>Sending`` and ``<prefix>Receiving``."""
    tokens: int
    size: int
    options: Facts = {}
    folder: str = ""
    """For files that cross; emptied by the coordinator."""
    timeout_s: float = 60.0


class Link:
    """A pair of connected Unix sockets between the two ends: the cheapest way to say one byte to another process.

    Stands for whatever a peer's users tell the other side with (a message of their scheduler, an HTTP request)."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        connection.settimeout(timeout_s)

    def tell(self, word: bytes = b"!") -> None:
        self._connection.sendall(word)

    def wait(self) -> bytes:
        """The next byte from the other end.

        :raises EOFError: the other end is gone.
        :raises TimeoutError: it said nothing in time."""
        word = self._connection.recv(1)
        if not word:
            raise EOFError("the other end of this contestant is gone")
        return word


class End(ABC):
    """One end of a contestant, in its own process. Made once, used for many rounds."""

    def address(self) -> Facts:
        """What the other end must know to connect."""
        return {}

    def connect(self, other: Facts) -> None:  # noqa: B027  (some need not)
        """The other end's :meth:`address`."""

    def finish(self) -> Facts:
        """The round is over: gives back what it took. May report figures of its own."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Ends threads, closes sockets and files."""


class Sending(End):
    """Made as ``(job, source, link)``; ``source`` is uint8 [job.size], the embedding."""

    source: Bytes
    moved = 0
    """Bytes written so far by other ways than TCP sockets of this process: memory, files."""

    def stage(self, number: int) -> Facts:
        """The round's embedding is in ``source``, nothing of it has been sent. Answers what the other end must know."""
        return {}

    @abstractmethod
    def send(self) -> None:
        """Timed. May return before everything has left."""


class Receiving(End):
    """Made as ``(job, link)``."""

    pool_bytes = 0
    """Memory that is shared by all transfers of the process, for the table."""
    counted_twice = 0
    """Bytes of it that are mapped twice, and so are counted twice by the kernel."""

    def arm(self, number: int, staged: Facts) -> None:
        """The request is known; called before the clock starts."""

    @abstractmethod
    def receive(self) -> None:
        """Timed. Returns when :meth:`arrays` may be used."""

    @abstractmethod
    def arrays(self) -> list[Bytes]:
        """The embedding, its fields one after another; valid until ``finish``."""

    def each(self) -> list[list[Bytes]]:
        """Every embedding that this round brought, if it brought several."""
        return [self.arrays()]
