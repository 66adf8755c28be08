"""The contract of a control plane: frames to peers and from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

from msgspec import Struct

from embferry.protocol.errors import EmbeddingTransferError


class Received(Struct, frozen=True):
    """One frame, whole and as it was sent.

    Attributes:
        peer: The peer to answer: an endpoint that this end dialled, or an opaque object for a peer that dialled us.
        data: The frame.
    """

    peer: Hashable
    data: bytes


class Unreachable(Struct, frozen=True):
    """Nothing sent to ``peer`` arrives any more.

    An endpoint has been given up; a later :meth:`ControlPlane.send` to it begins anew. The connection of a peer that
    dialled us has ended; the same process may come back as another peer.
    """

    peer: Hashable
    error: EmbeddingTransferError


class ControlPlane(ABC):
    """Delivers frames in order to each peer, each at most once while a connection lasts; frames may be lost.

    The machines repeat what is not answered. All methods but the constructor are for one thread, the driver's.

    Attributes:
        endpoint: ``tcp://host:port``, which peers dial; empty if this end only dials.
    """

    endpoint: str = ""

    @property
    @abstractmethod
    def dropped_frames(self) -> int:
        """Frames not sent, so far, because their peer was gone or did not read."""

    @abstractmethod
    def send(self, peer: Hashable, data: bytes) -> None:
        """Queues one frame. Never blocks, and never raises for what a peer or the network does.

        A frame for a peer that is gone or whose queue is full is dropped and counted.

        Args:
            peer: An endpoint (``str``), which is dialled if need be, or the peer of a :class:`Received`.
            data: 1 to ``MAX_FRAME_BYTES`` bytes.

        Raises:
            LocalProtocolError: The length is out of bounds.
        """

    @abstractmethod
    def poll(self) -> list[Received | Unreachable]:
        """Returns the events since the last call, in order."""

    def flush(self) -> None:
        """Sends now what is queued. Only for speed: it happens by itself before the driver waits again."""
        return

    def serves(self, peer: Hashable) -> None:
        """A transfer uses the frames of ``peer``. A bounded plane closes the connections of other peers first."""
        return

    @abstractmethod
    def forget(self, peer: Hashable) -> None:
        """No transfer needs ``peer`` now: its connection may be closed once idle. A later ``send`` undoes this."""

    @abstractmethod
    def close(self, linger_s: float = 0.2) -> None:
        """Sends what is queued, for up to ``linger_s`` seconds, and closes every descriptor. Idempotent."""
