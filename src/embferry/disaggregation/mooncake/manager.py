"""The driver of one end of the origin's wire, with its sockets: one PULL, and a PUSH for each peer."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Self

import zmq

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transfer.driver import DriverThread, bind, tcp_endpoint

from ..wire.messages import MAX_FRAME_BYTES, OriginWire
from .session_engines import OpenEngine
from .settings import OriginSettings, check_geometry

log = logging.getLogger(__name__)

HIGH_WATER = 16384  # messages queued for one peer, or from all of them
MAX_PEERS = 256  # PUSH sockets; the least recently used one is closed first
LONGEST_FRAME = 2 * MAX_FRAME_BYTES  # ZeroMQ drops longer frames unread; up to here they are refused with a reason


class MooncakeEmbeddingManager(DriverThread[list[bytes]]):
    """One rank's end of the origin's wire: an :class:`EncodeManager` or a :class:`LanguageManager`.

    Args:
        name: Name of the driver thread.
        geometry: Fields, number of blocks and block size of the language side's pool, the same on both sides.
        settings: Settings of this rank; the defaults if None.
        transfer: Time-outs and the default allocation; the defaults if None.
        open_engine: Makes an engine; None makes Mooncake Transfer Engines.

    Raises:
        LocalProtocolError: The geometry does not have the origin's fields.
        TransportError: The address cannot be bound.
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
        super().__init__(name)
        self.geometry = geometry
        self.settings = settings or OriginSettings()
        self.transfer = transfer or TransferSettings()
        self.wire = OriginWire(geometry.num_blocks, geometry.block_size, num_buffers=len(geometry.layout.fields) + 1)
        self.open_engine = open_engine or self.settings.make_engine
        self._pushes: OrderedDict[tuple[str, int], zmq.Socket[bytes]] = OrderedDict()  # by the peer's host and port
        self._calls: deque[Callable[[], None]] = deque()
        self._ending = False
        self._pull = self.socket(zmq.PULL)
        try:
            self.port = int(bind(self._pull, self.settings.host, self.settings.port).rpartition(":")[2])
        except TransportError:
            self.stop()
            raise

    def close(self) -> None:
        """Ends the open transfers, the engines, the thread and the sockets. Idempotent."""
        with self.lock:
            if self._ending:
                return
            self._ending = True
        self._end_transfers()
        with self.lock:
            if self.fault is None:
                self.advance(self.now())  # processes what the end of the transfers has queued
        self.stop()
        self._free_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For subclasses

    @abstractmethod
    def _receive(self, frames: Sequence[bytes], now: float) -> None:
        """Processes a message. The lock is held. A malformed message raises nothing."""

    @abstractmethod
    def _expire(self, now: float) -> float | None:
        """Executes what is due at ``now``. Returns when it is due again. The lock is held."""

    @abstractmethod
    def _end_transfers(self) -> None:
        """Ends every transfer, and every other thread that may call. The driver thread still runs."""

    def _free_memory(self) -> None:
        """Frees what peers could write to. The driver thread has ended."""

    def call(self, function: Callable[[], None]) -> None:
        """Has the driver thread run ``function`` with the lock held, in the order of the calls. Any thread."""
        self._calls.append(function)
        self.wake()

    def push(self, host: str, port: int, frames: list[bytes]) -> None:
        """Queues a message to the PULL socket at ``host`` and ``port``."""
        self._outbox.append(((host, port), frames))

    def check(self) -> None:
        super().check()
        if self._ending:
            raise LocalProtocolError("this manager is closed")

    # The driver

    def wake(self) -> None:
        with self.lock:  # threads that are not ours wake this one, so its descriptor may not be closed meanwhile
            super().wake()

    def advance(self, now: float) -> float | None:
        while self._calls:
            self._calls.popleft()()
        return self._expire(now)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = super().socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, LONGEST_FRAME)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.setsockopt(zmq.IPV6, 1)
        return socket

    def _sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._pull, *self._pushes.values()]

    def _take_one(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        with self.lock:
            self._receive(frames, self.now())

    def _send_to(self, peer: object, message: list[bytes]) -> None:
        assert isinstance(peer, tuple)
        host, port = peer
        try:
            self._push_socket(host, port).send_multipart(message, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # This wire repeats no message; the time-out of the peer ends the room.
            log.warning("a message to %s port %d could not be sent: %s", host, port, error)
            raise

    def _push_socket(self, host: str, port: int) -> zmq.Socket[bytes]:
        socket = self._pushes.get((host, port))
        if socket is None:
            socket = self.socket(zmq.PUSH)
            try:
                socket.connect(tcp_endpoint(host, port))
            except zmq.ZMQError:
                self.drop_socket(socket)
                raise
            self._pushes[host, port] = socket
            if len(self._pushes) > MAX_PEERS:
                self.drop_socket(self._pushes.popitem(last=False)[1])
        self._pushes.move_to_end((host, port))
        return socket
