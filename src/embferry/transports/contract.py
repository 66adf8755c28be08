"""The contract of a transport.

The receiving side owns a region and decides who may write where: it *registers* the region, *admits* a window
(these blocks, under this epoch), and *revokes* it. The sending side *connects* to a handle and *writes* under an
epoch. Everything is non-blocking; results come out of :meth:`Transport.poll`. A transport refuses a write that no
admitted window covers: on the receiving side where it can, and in any case before a byte is written.

:mod:`embferry.testing.conformance` is the suite that every transport passes. It is public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from msgspec import Struct

from embferry.memory.piece import Piece
from embferry.protocol.errors import TransportError

__all__ = [
    "Capabilities",
    "ConnectionCounts",
    "Event",
    "LinkLost",
    "Piece",
    "Receiving",
    "Region",
    "Revoked",
    "Transport",
    "Window",
    "Written",
]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Needs of a transport beyond the contract."""

    maps_region: bool = False
    """Whether the region must be memory that can be mapped a second time (``Region.fd``)."""


class Region(Protocol):
    """Memory that peers write into, such as :class:`~embferry.memory.buffers.MultimodalDataBuffers`."""

    @property
    def view(self) -> memoryview:
        """The whole region, writable, format ``B``."""
        ...

    @property
    def fd(self) -> int | None:
        """A sealed memfd that another process of this host can map, or None for private memory."""
        ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` of each field, ascending: block ``b`` is the ``size`` bytes at ``offset + b * size``.

        From this a transport computes which blocks a byte range touches.
        """
        ...


class Window(Struct, frozen=True):
    """Permission to write to ``blocks`` of the region under ``epoch``."""

    epoch: int
    blocks: tuple[int, ...]


class Written(Struct, frozen=True):
    """The write ``ticket`` has ended: its bytes are in the peer's region (``error`` None), or no more will be sent."""

    ticket: int
    error: TransportError | None = None


class Revoked(Struct, frozen=True):
    """From now on no write under ``epoch`` can change a byte, even if the peer is malicious."""

    epoch: int


class Receiving(Struct, frozen=True):
    """Bytes are coming in under ``epoch``, too slowly for a write to end soon. Optional, once a second at most."""

    epoch: int


class LinkLost(Struct, frozen=True):
    """The connection behind ``handle`` broke. Writes in flight have been reported as :class:`Written` with an error."""

    handle: bytes
    error: TransportError


@dataclass(frozen=True, slots=True)
class ConnectionCounts:
    """Connections that a transport has accepted."""

    open: int = 0
    """Open now."""
    evicted: int = 0
    """Closed so far to make room for others."""
    refused: int = 0
    """Closed so far because there was no room to make."""


Event = Written | Revoked | Receiving | LinkLost


class Transport(ABC):
    """Moves bytes from a sender into a receiver's region. Thread-safe.

    Args:
        wake: Called on any thread, possibly with locks of the transport held, whenever :meth:`poll` has a new event.
            Must not block.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.wake = wake

    @property
    def address(self) -> bytes:
        """The address of this sending end, at most 1 KiB, for transports on which the receiver fetches; else empty.

        It travels in a control message.
        """
        return b""

    @property
    def connections(self) -> ConnectionCounts:
        """Counts of accepted connections, for metrics. Any thread."""
        return ConnectionCounts()

    # Receiving side
    @abstractmethod
    def register(self, region: Region) -> bytes:
        """Makes the region reachable, closed to every write.

        Returns:
            The handle that peers connect with, at most 1 KiB.

        Raises:
            LocalProtocolError: A region is registered already.
            TransportError: The transport cannot start here.
        """

    def connect_to_sender(self, address: bytes) -> None:  # noqa: B027  (most transports need nothing)
        """Prepares to be written to by the sender at ``address``, which came from the wire. Idempotent.

        Raises:
            TransportError: The address is malformed, or unreachable from here (not retryable).
        """

    @abstractmethod
    def admit(self, window: Window) -> None:
        """Opens ``window``.

        Raises:
            LocalProtocolError: A block of it belongs to another open window.
        """

    @abstractmethod
    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        """Removes ``blocks`` from the window of ``epoch`` at once: its writer is done with them.

        The window ends with its last block. Unknown epochs and blocks are ignored.
        """

    @abstractmethod
    def revoke(self, epoch: int) -> None:
        """Closes the window whether or not its writer is done. :class:`Revoked` follows once no write can reach it.

        ``Revoked`` is reported exactly once for each call, also for an epoch that was never admitted.
        """

    # Sending side
    @abstractmethod
    def connect(self, handle: bytes) -> None:
        """Prepares to write to the region behind ``handle``, which came from the wire. Idempotent.

        Raises:
            TransportError: The handle is malformed or unreachable from here (not retryable), or the connection was
                refused (retryable).
        """

    @abstractmethod
    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        """Starts to write ``pieces``, all in ``blocks``, under ``epoch``. :class:`Written` follows exactly once.

        The sources must stay valid and unchanged until then. A broken connection is an event, not an exception.
        """

    @abstractmethod
    def disconnect(self, handle: bytes) -> None:
        """Closes the connection. Writes in flight end in :class:`Written` first. Unknown handles are ignored.

        :class:`LinkLost` does not follow, also if the receiver closes at the same time.
        """

    # Both
    @abstractmethod
    def poll(self) -> list[Event]:
        """Returns the events since the last call. Never blocks."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads, closes sockets, unmaps memory. Idempotent. No byte is written to the region afterwards."""
