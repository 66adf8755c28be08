"""The thread that drives one end of the origin's wire, and its sockets: one PULL, and a PUSH for each peer.

Only this thread touches ZeroMQ sockets. Whoever else has something to do or to send puts it in a queue and wakes it,
so public methods never wait for the network. What transfers are is guarded by one lock.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Self

import zmq

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transports.leased.mooncake.engine import Engine

from ..wire.frames import MAX_FRAME_BYTES, OriginWire
from .settings import OriginSettings, check_geometry

log = logging.getLogger(__name__)

HIGH_WATER = 16384  # messages queued for one peer, or from all of them
BATCH = 256  # messages taken in before anything else gets its turn
IDLE_S = 60.0
LINGER_MS = 200  # so that the last word still leaves
MAX_PEERS = 256  # PUSH sockets; the one that was used least recently goes first
LONGEST_FRAME = 2 * MAX_FRAME_BYTES  # what is longer than this is not even read; up to here it is refused with a reason

OpenEngine = Callable[[], Engine]


class MooncakeEmbeddingManager(ABC):
    """One worker's end of the origin's wire: :class:`~.sending.EncodeManager` or :class:`~.receiving.LanguageManager`.

    :param geometry: fields, number of blocks and block size of the language side's pool, on both sides the same.
    :param open_engine: makes an engine; None: the Mooncake Transfer Engine.
    :raises TransportError: the address cannot be bound.
    """

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        settings: OriginSettings | None,
        transfer: TransferSettings | None,
        open_engine: OpenEngine | None,
    ) -> None:
        check_geometry(geometry)
        self.geometry = geometry
        self.settings = settings or OriginSettings()
        self.transfer = transfer or TransferSettings()
        self.wire = OriginWire(geometry.num_blocks, geometry.block_size, num_buffers=len(geometry.layout.fields) + 1)
        self.lock = threading.RLock()
        self.fault: Exception | None = None
        self.dropped_messages = 0
        self.open_engine = open_engine or (lambda: Engine(self.settings.engine))
        self._context = zmq.Context()
        self._pushes: OrderedDict[tuple[str, int], zmq.Socket[bytes]] = OrderedDict()
        self._outgoing: deque[tuple[str, int, list[bytes]]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._pull = self._socket(zmq.PULL)
        try:
            self._pull.bind(_endpoint(self.settings.host, self.settings.port or "*"))
        except zmq.ZMQError as error:
            self._pull.close()
            self._context.term()
            raise TransportError(
                f"cannot listen on {self.settings.host}:{self.settings.port}: {error}; choose another port or host",
                retryable=False,
            ) from None
        self.port = int(self._pull.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def close(self) -> None:
        """Ends what is open, the engines, the thread and the sockets. Idempotent."""
        with self.lock:
            if self._ending:
                return
            self._ending = True
        self._shut_down()
        with self.lock:
            self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.is_alive():
            self._thread.join()
        for socket in (self._pull, *self._pushes.values()):
            socket.close()
        self._context.term()
        os.close(self._wake_fd)
        self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For subclasses

    @abstractmethod
    def _take(self, frames: Sequence[bytes], now: float) -> None:
        """A message, as it came. The lock is held. Raises for nothing that is in it."""

    @abstractmethod
    def _advance(self, now: float) -> float | None:
        """Lets time pass; when it is due again. The lock is held."""

    @abstractmethod
    def _shut_down(self) -> None:
        """Ends every transfer and whatever may call; the thread still runs."""

    def _closed(self) -> None:  # noqa: B027  (a hook: one side has memory to give back)
        """The thread has ended."""

    @abstractmethod
    def _collapsed(self) -> None:
        """The thread has stopped by a bug of ours: tells whoever waits. The lock is held."""

    def _start(self) -> None:
        self._thread.start()

    def call(self, what: Callable[[], None]) -> None:
        """Runs ``what`` on the thread soon, with the lock held, in the order of the calls. Any thread."""
        self._calls.append(what)
        self.wake()

    def wake(self) -> None:
        """Makes the thread look around. Any thread; never blocks."""
        with self.lock:
            if not self._closing:
                os.eventfd_write(self._wake_fd, 1)

    def push(self, host: str, port: int, frames: list[bytes]) -> None:
        """Queues a message to whoever pulls there."""
        self._outgoing.append((host, port, frames))

    def check(self) -> None:
        """Raises :class:`LocalProtocolError` when transfers cannot go on here: closed, or stopped by a bug of ours."""
        if self.fault is not None:
            raise LocalProtocolError(f"the transfer thread has stopped: {self.fault!r}; restart this worker")
        if self._ending:
            raise LocalProtocolError("this manager is closed")

    @staticmethod
    def now() -> float:
        """The clock of all transfers, seconds."""
        return time.monotonic()

    # The thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            due: float | None = None
            while not self._closing:
                wait = IDLE_S if due is None else min(max(0.0, due - self.now()), IDLE_S)
                for source, _ in poller.poll(math.ceil(wait * 1000)):
                    if source == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                due = self._turn()
            self._turn()
        except Exception as error:
            log.critical("the transfer thread has stopped; this is a bug", exc_info=error)
            with self.lock:
                self.fault = error
                self._collapsed()

    def _turn(self) -> float | None:
        for _ in range(BATCH):
            try:
                frames = self._pull.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            with self.lock:
                self._take(frames, self.now())
        with self.lock:
            while self._calls:
                self._calls.popleft()()
            due = self._advance(self.now())
        while self._outgoing:
            self._push(*self._outgoing.popleft())
        return due

    def _push(self, host: str, port: int, frames: list[bytes]) -> None:
        try:
            self._push_socket(host, port).send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Nothing is repeated on this wire; the peer's time-out notices.
            self.dropped_messages += 1
            log.warning("a message to %s port %d could not be sent: %s", host, port, error)

    def _push_socket(self, host: str, port: int) -> zmq.Socket[bytes]:
        socket = self._pushes.get((host, port))
        if socket is None:
            socket = self._socket(zmq.PUSH)
            try:
                socket.connect(_endpoint(host, port))
            except zmq.ZMQError:
                socket.close()
                raise
            self._pushes[host, port] = socket
            if len(self._pushes) > MAX_PEERS:
                self._pushes.popitem(last=False)[1].close()
        self._pushes.move_to_end((host, port))
        return socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, LONGEST_FRAME)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.setsockopt(zmq.IPV6, 1)
        return socket


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host.strip('[]')}]:{port}" if ":" in host else f"tcp://{host}:{port}"
