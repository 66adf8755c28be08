"""A transport whose exceptions are caught: one costs a write or, at worst, this transport.

An exception in a call that concerns one peer (``connect``, ``write``, ``disconnect``) is the failure of that call. An
exception in a call on which the safety of the region depends (``poll``, ``revoke``, ``close_blocks``) loses the
transport: it is closed, after which it writes no byte, its writes are reported as failed and its epochs as revoked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from embferry.protocol.errors import TransportError, shown
from embferry.transports.contract import Event, Piece, Region, Revoked, Transport, Window, Written

from .failures import as_transfer_error, attempt

log = logging.getLogger(__name__)

CLOSE_AGAIN_SECONDS = 5.0
"""How often a transport that could not be closed is closed again. Until then blocks that it may write are missing."""


class GuardedTransport:
    """Wraps a :class:`Transport`, and has the same methods.

    The manager's lock is held during every call but ``register``, which is made before the manager runs, and ``close``.

    Args:
        transport: The transport. It is closed with this object.
        wake: Called by the transport, on any thread, when :meth:`poll` has something new.

    Attributes:
        lost: Why the transport is of no use any more, or None.
        is_closed: Whether it is closed, and so writes no byte any more.
    """

    def __init__(self, transport: Transport, wake: Callable[[], None]) -> None:
        transport.wake = wake
        self.name = transport.name
        self.capabilities = transport.capabilities
        self.lost: TransportError | None = None
        self._transport, self._wake = transport, wake
        self._tickets: set[int] = set()  # writes that have not ended
        self._revoking: set[int] = set()  # epochs whose Revoked is outstanding
        self._events: list[Event] = []  # events made here
        self._close_again_at = math.inf
        self.is_closed = False

    @property
    def may_still_write(self) -> bool:
        """Whether the transport has failed, and could not be closed either."""
        return self.lost is not None and not self.is_closed

    @property
    def address(self) -> bytes:
        found: list[bytes] = []
        if (error := attempt(lambda: found.append(self._transport.address))) is not None:
            self._lose("address", error)
        return found[0] if found else b""

    # Receiving side

    def register(self, region: Region) -> bytes:
        return self._transport.register(region)

    def connect_to_sender(self, address: bytes) -> None:
        self._check()
        self._per_peer("connect_to_sender", self._transport.connect_to_sender, address)

    def admit(self, window: Window) -> None:
        """Opens a window. :meth:`revoke` closes the epoch again, also after an exception."""
        self._check()
        self._transport.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        """Closes blocks of a window. If that fails, the transport is lost, and :attr:`may_still_write` says more."""
        if self.lost is None and (error := attempt(self._transport.close_blocks, epoch, blocks)) is not None:
            self._lose("close_blocks", error)

    def revoke(self, epoch: int) -> None:
        self._revoking.add(epoch)
        if self.lost is not None:
            self._all_ended()
        elif (error := attempt(self._transport.revoke, epoch)) is not None:
            self._lose("revoke", error)

    # Sending side

    def connect(self, handle: bytes) -> None:
        self._check()
        self._per_peer("connect", self._transport.connect, handle)

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        """Starts a write. :class:`Written` follows exactly once, also if the transport raises."""
        if self.lost is not None:
            self._end(ticket, self.lost)
            return
        self._tickets.add(ticket)
        error = attempt(self._transport.write, handle, epoch, blocks, pieces, ticket)
        if error is not None:
            log.warning("the %s transport could not write: %s", self.name, shown(error))
            self._end(ticket, self._as_error("write", error))
            del error  # its traceback refers to this frame, and so to the embedding

    def disconnect(self, handle: bytes) -> None:
        if self.lost is None and (error := attempt(self._transport.disconnect, handle)) is not None:
            log.warning("the %s transport could not disconnect: %s", self.name, shown(error))

    # Both

    def poll(self) -> list[Event]:
        """Returns the events since the last call: each ticket and each revoked epoch once."""
        if self.lost is None and (error := attempt(self._take_events)) is not None:
            self._lose("poll", error)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Closes the transport; then :meth:`poll` returns the ends of all its writes.

        Raises:
            Exception: The transport has raised it. The call may be repeated.
        """
        if self.lost is None:
            self.lost = TransportError("this worker is shutting down", retryable=True)
        error = attempt(self._transport.close)
        if (lost := attempt(self._take_events)) is not None:
            log.warning("the %s transport has lost its last events: %s", self.name, shown(lost))
        self.is_closed = error is None
        self._all_ended()
        if error is not None:
            raise error

    def _take_events(self) -> None:
        for event in self._transport.poll():
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Written):
            if event.ticket not in self._tickets:
                return  # it has been reported as failed
            self._tickets.discard(event.ticket)
            if event.error is not None and not isinstance(event.error, TransportError):
                event = Written(event.ticket, self._as_error("a write", event.error))
        elif isinstance(event, Revoked):
            if event.epoch not in self._revoking:
                return
            self._revoking.discard(event.epoch)
        self._events.append(event)

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost.copied()

    def _per_peer(self, name: str, call: Callable[[bytes], None], argument: bytes) -> None:
        error = attempt(call, argument)
        if isinstance(error, TransportError):
            raise error
        if error is not None:
            log.warning("%s of the %s transport failed", name, self.name, exc_info=error)
            raise self._as_error(name, error)

    def _as_error(self, name: str, error: Exception) -> TransportError:
        if isinstance(error, TransportError):
            return error
        cause = as_transfer_error(f"{name} of the {self.name} transport", error)
        return TransportError(cause.detail, retryable=cause.retryable)

    def _end(self, ticket: int, error: TransportError) -> None:
        self._tickets.discard(ticket)
        self._events.append(Written(ticket, error))
        self._wake()

    def _lose(self, name: str, error: Exception) -> None:
        log.critical("the %s transport is given up: %s raised %s", self.name, name, shown(error), exc_info=error)
        cause = f"{name}: {shown(error)}"
        why = f"the {self.name} transport of this worker has failed ({cause}); restart it to use it again"
        self.lost = TransportError(why, retryable=False)
        self._close_lost()

    def _close_lost(self) -> None:
        if not self.is_closed:
            error = attempt(self._transport.close)
            self.is_closed = error is None
            if error is not None:
                log.critical("the %s transport cannot be closed either: %s", self.name, shown(error), exc_info=error)
        self._all_ended()

    def close_again(self) -> None:
        """Tries again to close a transport that has failed and could not be closed.

        That frees the blocks that it may write.
        """
        if self.may_still_write:
            self._close_lost()

    def close_when_due(self, now: float) -> float:
        """Does :meth:`close_again` from time to time, as long as that is needed. Returns when it is due again."""
        if not self.may_still_write:
            self._close_again_at = math.inf
        elif self._close_again_at == math.inf:
            self._close_again_at = now + CLOSE_AGAIN_SECONDS
        elif now >= self._close_again_at:
            self.close_again()
            self._close_again_at = now + CLOSE_AGAIN_SECONDS if self.may_still_write else math.inf
        return self._close_again_at

    def _all_ended(self) -> None:
        """Reports what has ended with the transport.

        A transport that could not be closed may still write into the region, so its epochs are not reported as revoked:
        their blocks stay in quarantine. Its writes are: a source that changes under one fails its checksum.
        """
        self._events += [Written(ticket, self.lost) for ticket in sorted(self._tickets)]
        self._tickets.clear()
        if self.is_closed:
            self._events += [Revoked(epoch) for epoch in sorted(self._revoking)]
            self._revoking.clear()
        self._wake()
