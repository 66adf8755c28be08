"""Base of the transports over sockets: one thread, a link for each handle, an orderly end."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from embferry.protocol.errors import LocalProtocolError, TransportError

from ..contract import ConnectionCounts, Event, LinkLost, Piece, Transport, Window, Written
from ..outbox import Outbox
from .listener import Listener
from .loop import LoopThread, Scope

log = logging.getLogger(__name__)


class Receiving(Protocol):
    """The receiving side of a registered region, as in the contract of a transport."""

    def admit(self, window: Window) -> None: ...

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None: ...

    def revoke(self, epoch: int) -> None: ...


class Link(Protocol):
    """The connection to the receiver behind one handle.

    Attributes:
        scope: The link's part of the loop, in which its callbacks run.
    """

    scope: Scope

    @property
    def has_ended(self) -> bool:
        """Whether no write enters any more. Any thread."""

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        """Starts a write, which ends in one ``Written``, also after :meth:`end`. Any thread."""

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight, then the link. Idempotent. Runs on the loop's thread.

        ``lost`` means that the other side or the network has ended it; ``LinkLost`` is then posted last.
        """


R = TypeVar("R", bound=Receiving)
L = TypeVar("L", bound=Link)


class LinkedTransport(Transport, Generic[R, L]):
    """A transport with one loop thread. A subclass registers the region, makes links and ends the receiving side."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        super().__init__(wake)
        self._outbox = Outbox(lambda: self.wake())
        try:
            self._loop = LoopThread(f"embferry-{self.name}", self._outbox.fail)
        except OSError as error:
            raise TransportError(f"the {self.name} transport cannot start: {error}") from error
        self._receiving: R | None = None
        self._lock = threading.Lock()  # guards the attributes below
        self._links: dict[bytes, L] = {}
        self._unfinished: set[L] = set()
        self._disconnected: set[L] = set()  # unfinished ones that this end has disconnected: their loss is no news
        self._closed = False

    def admit(self, window: Window) -> None:
        self._registered().admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._registered().close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self._registered().revoke(epoch)

    def connect(self, handle: bytes) -> None:
        with self._lock:
            present = self._links.get(handle) if isinstance(handle, bytes) else None
        if present is None or present.has_ended or self._closed:
            self._connect(handle)  # reads the handle, which takes a while: not again before each write

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
        if link is None:
            self._outbox.post(Written(ticket, TransportError("there is no connection to this receiver; connect first")))
        else:
            link.write(epoch, pieces, ticket)

    def disconnect(self, handle: bytes) -> None:
        with self._lock:
            link = self._links.pop(handle, None)
            if link is not None:
                self._disconnected.add(link)
        if link is not None:
            link.scope.call(partial(link.end, TransportError("this end disconnected"), lost=False))

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._unfinished)
        for link in links:
            link.scope.call(partial(link.end, TransportError("this end was closed"), lost=False))
        try:
            self._shut(links)
        finally:
            self._loop.close()

    @property
    def connections(self) -> ConnectionCounts:
        listener = self._listener()
        return ConnectionCounts() if listener is None else listener.counts

    # For subclasses

    @abstractmethod
    def _connect(self, handle: bytes) -> None:
        """Makes the link behind ``handle`` with :meth:`_join`. It is absent, or about to end.

        Raises:
            TransportError: The handle is malformed, or the receiver cannot be reached.
        """

    def _listener(self) -> Listener[Any] | None:
        """Returns the listener, if the transport has one by now."""
        return None

    @abstractmethod
    def _shut(self, links: Sequence[L]) -> None:
        """Ends the receiving side. ``links`` are ending already; the loop runs until this returns."""

    def _check_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("this transport is closed")

    def _check_unregistered(self) -> None:
        if self._receiving is not None or self._closed:
            raise LocalProtocolError("one region a transport; make another transport for another region")

    def _registered(self) -> R:
        if self._receiving is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._receiving

    def _join(self, handle: bytes, link: Callable[[], L]) -> None:
        """Makes the link behind ``handle``, unless there is one that has not ended.

        Raises:
            TransportError: ``link`` has raised it.
        """
        with self._lock:
            self._check_open()
            present = self._links.get(handle)
            if present is None or present.has_ended:
                self._links[handle] = made = link()
                self._unfinished.add(made)

    def _forget(self, handle: bytes, link: L) -> bool:
        """Removes a link that has ended. Returns False if this end has disconnected it, so that its loss is no news."""
        with self._lock:
            self._unfinished.discard(link)
            if self._links.get(handle) is link:
                del self._links[handle]
            if link in self._disconnected:
                self._disconnected.discard(link)
                return False
            return True

    def _over(self, handle: bytes, link: L, tickets: Iterable[int], error: TransportError, lost: bool) -> None:
        """Removes a link that has ended, reports its writes in flight and, if it is ``lost``, the link."""
        is_news = self._forget(handle, link)
        for ticket in tickets:
            self._outbox.post(Written(ticket, error))
        if lost and is_news:
            log.info("lost the connection to a receiver: %s", error)
            self._outbox.post(LinkLost(handle, error))
