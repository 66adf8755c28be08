"""The contract a transport fulfils, as small as it can be.

The receiving side owns a region and decides who may write where: it *registers* the region, *admits* a window
(these blocks, under this epoch), and *revokes* it. The sending side *connects* to a handle and *writes* under an
epoch. Everything is non-blocking; results come out of :meth:`Transport.poll`. A transport refuses a write that no
admitted window covers, on the receiving side where it can, and in any case before a byte lands.

:mod:`embferry.testing.conformance` is the suite that every transport passes; it is public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from embferry.memory.piece import Piece
from embferry.protocol.errors import TransportError

__all__ = [
    "Capabilities",
    "Event",
    "LinkLost",
    "Piece",
    "Region",
    "Revoked",
    "Transport",
    "Window",
    "Written",
]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do beyond the contract."""

    same_host_only: bool
    device_memory: bool = False
    """Reads from and writes to GPU memory without staging."""
    copies_payload: int = 0
    """Copies of the payload in user space on its way from source tensor to destination blocks, the landing excluded."""
    maps_region: bool = False
    """The region must be memory that can be mapped a second time (``Region.fd``)."""


class Region(Protocol):
    """Memory that peers write into; :class:`~embferry.memory.buffers.MultimodalDataBuffers` is one."""

    @property
    def view(self) -> memoryview:
        """All of it, writable, format ``B``."""
        ...

    @property
    def fd(self) -> int | None:
        """A sealed memfd another process of this host can map, or None for private memory."""
        ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` of each field, ascending: block ``b`` is the ``size`` bytes at ``offset + b * size``.

        This is what lets a transport see which blocks a byte range touches."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Leave to write to ``blocks`` of the region under ``epoch``."""

    epoch: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """The write ``ticket`` is over: the bytes are in the peer's region (``error`` None), or no more will be sent."""

    ticket: int
    error: TransportError | None = None


@dataclass(frozen=True, slots=True)
class Revoked:
    """From now on no write under ``epoch`` can change a byte, whatever the peer does."""

    epoch: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The connection behind ``handle`` broke. Writes in flight have been reported as :class:`Written` with an error."""

    handle: bytes
    error: TransportError


Event = Written | Revoked | LinkLost


class Transport(ABC):
    """One transport for bytes. Thread-safe: the driver's thread and the transport's own threads may overlap.

    ``wake`` is called (from any thread, must not block) whenever :meth:`poll` has something new.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.wake = wake

    @property
    def address(self) -> bytes:
        """What a receiver must know of this sending end before it can be written to (at most 1 KiB); empty: nothing.

        A transport on which the receiver fetches has one. It travels in a control message."""
        return b""

    # Receiving side
    @abstractmethod
    def register(self, region: Region) -> bytes:
        """Makes the region reachable, closed to every write. Returns the handle a peer connects with (at most 1 KiB).

        One region a transport; a second call raises ``LocalProtocolError``."""

    def connect_to_sender(self, address: bytes) -> None:  # noqa: B027  (most transports need nothing)
        """Prepares to be written to by the sending end at ``address``; idempotent. The address came from the wire.

        :raises TransportError: malformed or unreachable from here (not retryable)."""

    @abstractmethod
    def admit(self, window: Window) -> None:
        """Opens ``window``. Its blocks must belong to no other open window (``LocalProtocolError``)."""

    @abstractmethod
    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        """Takes ``blocks`` out of the window of ``epoch`` at once: its writer has said that it is done with them.

        The window is gone with its last block. Unknown epochs and blocks are ignored."""

    @abstractmethod
    def revoke(self, epoch: int) -> None:
        """Closes the window against its writer's will; :class:`Revoked` follows when that has become true.

        ``Revoked`` is reported exactly once for each call, also for an epoch that was never admitted."""

    # Sending side
    @abstractmethod
    def connect(self, handle: bytes) -> None:
        """Prepares to write to the region behind ``handle``; idempotent. The handle came from the wire.

        :raises TransportError: malformed or unreachable from here (not retryable), or refused (retryable)."""

    @abstractmethod
    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        """Begins to write ``pieces``, all in ``blocks`` ``epoch``; :class:`Written` with ``ticket`` follows once.

        The sources stay valid and unchanged until then. Never raises for a broken link: that is an event."""

    @abstractmethod
    def disconnect(self, handle: bytes) -> None:
        """Forgets the link; writes in flight end in :class:`Written` first. Unknown handles are ignored."""

    # Both
    @abstractmethod
    def poll(self) -> list[Event]:
        """What has happened since the last call. Never blocks."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads, closes sockets, unmaps memory. Idempotent. No byte lands in the own region after it returns."""
