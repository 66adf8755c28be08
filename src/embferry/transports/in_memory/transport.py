"""The ``memory`` transport: both ends in one process, for tests and for programs that run both sides.

A write happens inside the call, under the receiver's lock, so revocation is immediate.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError

from ..contract import Capabilities, Event, LinkLost, Piece, Region, Transport, Window, Written
from ..handles import decode_handle
from ..outbox import Outbox
from ..receive_region import ReceiveRegion
from ..windows import ranges_of

__all__ = ["InMemoryTransport"]


class MemoryHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-memory-1"):
    pid: int
    key: bytes


class InMemoryTransport(Transport):
    """A transport that copies within the process, during the call of :meth:`write`."""

    name = "memory"
    capabilities = Capabilities()

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        super().__init__(wake)
        self._outbox = Outbox(lambda: self.wake())
        self._receiver: _Receiver | None = None
        self._links: dict[bytes, _Receiver] = {}
        self._closed = False

    def register(self, region: Region) -> bytes:
        if self._receiver is not None or self._closed:
            raise LocalProtocolError("one region a transport; make another transport for another region")
        handle = msgspec.msgpack.encode(MemoryHandle(os.getpid(), os.urandom(16)))
        self._receiver = _Receiver(region, self._outbox)
        _receivers[handle] = self._receiver
        return handle

    def admit(self, window: Window) -> None:
        self._registered().admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._registered().close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self._registered().revoke(epoch)

    def connect(self, handle: bytes) -> None:
        decode_handle(handle, MemoryHandle, self.name)
        if handle in self._links:
            return
        receiver = _receivers.get(handle)
        if receiver is None or self._closed or not receiver.add_sender(self):
            raise TransportError("there is no such receiver in this process, or it is closed", retryable=False)
        self._links[handle] = receiver

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        receiver = self._links.get(handle)
        if receiver is None:
            error: TransportError | None = TransportError("there is no link to this receiver; connect first")
        else:
            error = receiver.write(epoch, pieces)
        self._outbox.post(Written(ticket, error))

    def disconnect(self, handle: bytes) -> None:
        receiver = self._links.pop(handle, None)
        if receiver is not None:
            receiver.senders.pop(self, None)

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        self._closed = True
        for handle in list(self._links):
            self.disconnect(handle)
        if self._receiver is not None:
            self._receiver.close()

    def _on_receiver_close(self, receiver: _Receiver) -> None:
        for handle in [handle for handle, linked in self._links.items() if linked is receiver]:
            del self._links[handle]
            self._outbox.post(LinkLost(handle, TransportError("the receiver was closed")))

    def _registered(self) -> _Receiver:
        if self._receiver is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._receiver


class _Receiver(ReceiveRegion):
    """The receiving end of a transport, as its senders see it."""

    def __init__(self, region: Region, outbox: Outbox) -> None:
        super().__init__(region, outbox)
        self.senders: weakref.WeakKeyDictionary[InMemoryTransport, None] = weakref.WeakKeyDictionary()  # in order
        self._closed = False

    def add_sender(self, sender: InMemoryTransport) -> bool:
        """Adds a sender, unless the receiver is closed; returns whether it did."""
        with self.lock:
            if not self._closed:
                self.senders[sender] = None
            return not self._closed

    def write(self, epoch: int, pieces: Sequence[Piece]) -> TransportError | None:
        try:
            touched = self.windows.rows.touched(ranges_of(pieces))
        except OverflowError:
            touched = None
        with self.lock:
            if self._closed:
                return TransportError("the receiver was closed")
            if touched is None or not self.windows.allows(epoch, touched):
                return TransportError(f"no open window of epoch {epoch} covers the write", retryable=False)
            for piece in pieces:
                source = piece.source.cast("B")
                self.view[piece.offset : piece.offset + source.nbytes] = source
        return None

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self.view = memoryview(b"")  # the region can be released
            senders = list(self.senders)
            self.senders.clear()
        super().close()
        for sender in senders:
            sender._on_receiver_close(self)


_receivers: weakref.WeakValueDictionary[bytes, _Receiver] = weakref.WeakValueDictionary()
