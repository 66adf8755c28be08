"""The driver of one end of the origin's wire, with its sockets (one PULL, a PUSH for each peer); a base of handles."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar, Self, TypedDict

import zmq

from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError, RemoteProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transfer.callbacks import CallbackThread
from embferry.transfer.control.endpoint import tcp_endpoint
from embferry.transfer.handle import Handle
from embferry.transfer.waiting import wait

from ..wire.messages import MAX_FRAME_BYTES, OriginWire
from ..wire.room import OriginRoom
from .session_engines import OpenEngine
from .settings import OriginSettings, check_geometry
from .zmq_thread import ZmqThread, bind, check_listening

log = logging.getLogger(__name__)

HIGH_WATER = 16384  # messages queued for one peer, or from all of them
MAX_PEERS = 256  # PUSH sockets; the least recently used one is closed first
LONGEST_FRAME = 2 * MAX_FRAME_BYTES  # ZeroMQ drops longer frames unread; up to here they are refused with a reason


class Options(TypedDict, total=False):
    """Arguments that the managers of both sides take."""

    settings: OriginSettings | None
    transfer: TransferSettings | None
    open_engine: OpenEngine | None


class MooncakeEmbeddingManager(ZmqThread):
    """One rank's end of the origin's wire: an :class:`EncodeManager` or a :class:`LanguageManager`.

    Args:
        name: Name of the driver thread.
        geometry: Fields, number of blocks and block size of the language side's pool, the same on both sides.
        settings: Settings of this rank; the defaults if None.
        transfer: Time-outs and the default allocation; the defaults if None.
        open_engine: Makes an engine; None makes Mooncake Transfer Engines.

    Attributes:
        handles: The handles of the rooms that have begun and are not over.

    Raises:
        LocalProtocolError: The geometry does not have the origin's fields.
        TransportError: The address cannot be bound.
    """

    side: ClassVar[str]
    handles: Mapping[int, OriginHandle]

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        *,
        settings: OriginSettings | None = None,
        transfer: TransferSettings | None = None,
        open_engine: OpenEngine | None = None,
    ) -> None:
        check_geometry(geometry)
        super().__init__(name)
        self.geometry = geometry
        self.settings = settings or OriginSettings()
        self.transfer = transfer or TransferSettings()
        self.open_engine = open_engine or self.settings.make_engine
        self.wire = OriginWire(geometry.num_blocks, geometry.block_size, num_buffers=len(geometry.layout.fields) + 1)
        self._pushes: dict[str, zmq.Socket[bytes]] = {}  # by endpoint, the most recently used last
        self._calls: deque[Callable[[], None]] = deque()
        self._callbacks = CallbackThread(f"{name}-callbacks")
        self._ending = False
        self._pull = self.socket(zmq.PULL)
        try:
            check_listening(self.settings.host)
            self.port = int(bind(self._pull, self.settings.host, self.settings.port).rpartition(":")[2])
        except EmbeddingTransferError:
            self.stop()
            raise

    @property
    def fault(self) -> BaseException | None:
        """The bug that has stopped the manager for good. This one goes on after every error."""
        return None

    def close(self) -> None:
        """Ends the open transfers, the engines, the thread and the sockets. Idempotent."""
        with self.lock:
            if self._ending:
                return
            self._ending = True
        self._end_transfers()
        with ExitStack() as closing:  # each is closed, even if another one raises
            closing.callback(self._callbacks.close)
            closing.callback(self._free_memory)
            closing.callback(self.stop)
            with self.lock:
                self.advance(self.now())  # processes what the end of the transfers has queued

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For subclasses. The lock is held in the first two

    @abstractmethod
    def _receive(self, frames: Sequence[bytes], now: float) -> None:
        """Processes a message; raises RemoteProtocolError if it is refused."""

    @abstractmethod
    def _expire(self, now: float) -> float | None:
        """Executes what is due at ``now``. Returns when it is due again."""

    def _end_transfers(self) -> None:
        """Ends every transfer, and every other thread that may call. The driver thread still runs."""
        with self.lock:
            for handle in list(self.handles.values()):
                handle.abort(Aborted(f"the {self.side} side is shutting down", retryable=True))

    def _free_memory(self) -> None:
        """Frees what peers could write to. The driver thread has ended."""

    def call(self, function: Callable[[], None]) -> None:
        """Has the driver thread run ``function`` with the lock held, in the order of the calls. Any thread."""
        self._calls.append(function)
        self.wake()

    def push(self, host: str, port: int, frames: list[bytes]) -> None:
        """Queues a message to the PULL socket at ``host`` and ``port``."""
        self._outbox.append((tcp_endpoint(host, port), frames))

    def run_callback(self, call: Callable[[], None]) -> None:
        """Runs a user's callback soon, on the callback thread, without locks."""
        self._callbacks.post(call)

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
            try:
                self._receive(frames, self.now())
            except RemoteProtocolError as error:
                # This wire has no message that would tell the peer why.
                log.warning("refused a message (room %s): %s", error.room, error.detail)

    def _send_to(self, endpoint: str, message: list[bytes]) -> None:
        try:
            socket = self._pushes.pop(endpoint, None) or self._connected(endpoint)
            self._pushes[endpoint] = socket
            if len(self._pushes) > MAX_PEERS:
                self.drop_socket(self._pushes.pop(next(iter(self._pushes))))
            socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # This wire repeats no message; the time-out of the peer ends the room.
            log.warning("a message to %s could not be sent: %s", endpoint, error)
            raise

    def _connected(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self.socket(zmq.PUSH)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            self.drop_socket(socket)
            raise
        return socket


class OriginHandle(Handle):
    """One end of one room, as the caller holds it.

    Args:
        manager: The manager that drives the transfer.
        machine: State of the room. The manager's lock guards it.
    """

    def __init__(self, manager: MooncakeEmbeddingManager, machine: OriginRoom) -> None:
        super().__init__(machine.room, manager)
        self.manager, self.machine = manager, machine
        self._reported = self._state()

    @abstractmethod
    def _fail(self, error: EmbeddingTransferError) -> None:
        """Ends the transfer, which is not over. The lock is held."""

    def poll(self) -> KVPoll:
        """Returns where the transfer stands; raises LocalProtocolError if it goes on without a manager."""
        with self.manager.lock:
            if not self.machine.over:
                self.manager.check()
            return self.machine.status

    def wait(self, timeout: float) -> None:
        """Blocks the calling thread until the transfer has succeeded; see :func:`embferry.transfer.waiting.wait`."""
        wait(self, timeout)

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        with self.manager.lock:
            if not self.machine.over:
                self._fail(error or Aborted(f"aborted by the {self.manager.side} side"))

    def clear(self) -> None:
        """Releases what the transfer holds; the same as :meth:`abort` while it goes on."""
        self.abort()

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self.machine.error

    def _state(self) -> tuple[object, ...]:
        return (self.machine.status,)
