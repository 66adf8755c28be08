"""The sending side of one link: asks to enter, lets the courier carry, says when a write is over.

A write is reported when the receiver has confirmed that it knows of its end (``Left``). So whoever is told of the
report, by whatever transport, finds that writer no longer inside.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from embferry.protocol.errors import TransportError

from ...contract import LinkLost, Piece, Written
from ...net.connector import Connector
from ...net.loop import Loop
from ...outbox import Outbox
from ...windows import MAX_EPOCH, BlockRows, ranges_of
from .channel import BLOCK_BYTES, Channel, ChannelError, Enter, Entered, FromReceiver, Hello, Leave, Left
from .courier import Courier
from .flights import Cargo, Flights

log = logging.getLogger(__name__)

MAX_INSIDE = 64  # writes that have entered; others wait here
MAX_MESSAGE = 64


class Link:
    """Writes to the receiver behind ``handle``, with an engine of its own: so ending the link ends its transfers.

    :param forget: called once when the link is over, before :class:`LinkLost` is posted.
    :raises TransportError: the connection is refused at once.
    """

    def __init__(
        self,
        handle: bytes,
        address: tuple[str, int],
        token: bytes,
        rows: BlockRows,
        timeout_s: float,
        open_flights: Callable[[Callable[[Cargo], None]], Flights],
        loop: Loop,
        outbox: Outbox,
        forget: Callable[[bytes, Link], None],
    ) -> None:
        self._handle, self._rows = handle, rows
        self._loop, self._outbox, self._forget = loop, outbox, forget
        self._keys = itertools.count(1)
        self._lock = threading.Lock()  # of _error and _tickets
        self._error: TransportError | None = None
        self._lost = False
        self._tickets: dict[int, int] = {}
        self._waiting: deque[tuple[Cargo, bytes]] = deque()
        self._entered: dict[int, Cargo] = {}
        dial = Connector(address, loop, timeout_s, lambda: self._channel.open(), partial(self.end, lost=True))
        unsent = MAX_INSIDE * (MAX_MESSAGE + rows.num_blocks * BLOCK_BYTES)  # more there cannot be
        self._channel = Channel(
            dial.sock, loop, FromReceiver, MAX_MESSAGE, unsent, self._on_message, self._on_channel_end
        )
        self._channel.send(Hello(token))
        self._courier = Courier(open_flights, self._on_carried, self._on_broken, self._on_courier_end)
        self._courier.start()
        dial.start()

    # From any thread

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        try:
            touched = self._rows.touched(ranges_of(pieces))
        except OverflowError:
            touched = None
        if touched is None or not touched.size or not 1 <= epoch <= MAX_EPOCH:
            self._outbox.post(Written(ticket, _refused()))
            return
        key = next(self._keys)
        with self._lock:
            error = self._error
            if error is None:
                self._tickets[key] = ticket
        if error is not None:
            self._outbox.post(Written(ticket, error))
            return
        arrays = [(np.frombuffer(piece.source, np.uint8), piece.offset) for piece in pieces if piece.source.nbytes]
        spans = [(array.__array_interface__["data"][0], offset, array.size) for array, offset in arrays]
        cargo = Cargo(key, epoch, spans, source=arrays)
        self._loop.call(partial(self._ask, cargo, touched.astype("<u4").tobytes()))

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends what is under way, then reports it. ``lost``: it was not this side that wanted it."""
        with self._lock:
            if self._error is not None:
                return
            self._error, self._lost = error, lost
        self._loop.call(self._channel.close)
        self._courier.quit()

    def join(self) -> None:
        """After :meth:`end`: returns when the engine has ended."""
        self._courier.join()

    # On the courier's thread

    def _on_carried(self, cargo: Cargo) -> None:
        self._loop.call(partial(self._leave, cargo))

    def _on_broken(self, error: TransportError) -> None:
        self.end(error, lost=True)

    def _on_courier_end(self) -> None:
        self.end(TransportError("the program is ending"), lost=False)  # if nothing else ended it
        self._loop.call(self._report)

    # On the loop's thread

    def _on_channel_end(self, reason: str) -> None:
        self.end(TransportError(f"the connection to the receiver broke: {reason}"), lost=True)

    def _ask(self, cargo: Cargo, blocks: bytes) -> None:
        self._waiting.append((cargo, blocks))
        self._ask_more()

    def _ask_more(self) -> None:
        while self._waiting and len(self._entered) < MAX_INSIDE:
            cargo, blocks = self._waiting.popleft()
            self._entered[cargo.key] = cargo
            self._channel.send(Enter(cargo.key, cargo.epoch, blocks))

    def _on_message(self, message: FromReceiver) -> None:
        if isinstance(message, Entered):
            cargo = self._known(message.key, "asked")
            if message.address is None:
                self._finish(cargo, _refused())
            else:
                cargo.stage, cargo.base = "inside", message.address
                self._courier.carry(cargo)
        elif isinstance(message, Left):
            cargo = self._known(message.key, "left")
            if not message.allowed:
                self._finish(cargo, _refused())
            elif cargo.whole and cargo.clean:
                self._finish(cargo, None)
            else:
                self._finish(cargo, TransportError("the Mooncake engine could not carry it all; its log says why"))
        else:
            self._courier.drop(message.epoch)

    def _leave(self, cargo: Cargo) -> None:
        cargo.stage = "left"
        self._channel.send(Leave(cargo.key, cargo.clean))

    def _known(self, key: int, stage: str) -> Cargo:
        cargo = self._entered.get(key)
        if cargo is None or cargo.stage != stage:
            raise ChannelError(f"an answer about the write {key}, which waits for no such answer")
        return cargo

    def _finish(self, cargo: Cargo, error: TransportError | None) -> None:
        del self._entered[cargo.key]
        with self._lock:
            ticket = self._tickets.pop(cargo.key)
        self._outbox.post(Written(ticket, error))
        self._ask_more()

    def _report(self) -> None:
        error = self._error
        assert error is not None
        with self._lock:
            tickets, self._tickets = list(self._tickets.values()), {}
        self._waiting.clear()
        self._entered.clear()
        self._forget(self._handle, self)
        for ticket in tickets:
            self._outbox.post(Written(ticket, error))
        if self._lost:
            log.info("lost the link to a receiver: %s", error)
            self._outbox.post(LinkLost(self._handle, error))


def _refused() -> TransportError:
    return TransportError("the receiver has no open window that covers the write", retryable=False)
