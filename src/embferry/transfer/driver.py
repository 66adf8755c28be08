"""The driver: one thread that drives all transfers of a manager, and its control sockets.

Only this thread touches ZeroMQ sockets. Other threads queue what they send and wake it, so public methods never block
on the network. One lock guards the state machines.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Generic, TypeVar

import zmq

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, TransportError
from embferry.protocol.messages import MAX_FRAME_BYTES, VERSION, Body, Frame, decode, encode

log = logging.getLogger(__name__)

HIGH_WATER = 65536  # messages queued for one peer; further ones are dropped, and repeated later
BATCH = 256  # messages handled before timers and writes get their turn
IDLE_SECONDS = 60.0
LINGER_MS = 200  # so that the last abort still leaves

Message = TypeVar("Message")


class DriverThread(ABC, Generic[Message]):
    """The thread, its sockets and its outgoing messages, for any protocol.

    Calls :meth:`advance` whenever a message or a transport event has come or a time-out is due.
    """

    def __init__(self, name: str) -> None:
        self.lock = threading.RLock()
        self.dropped_messages = 0
        self.fault: Exception | None = None
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._outbox: deque[tuple[object, Message]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._closing = self._woken = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # For subclasses

    @abstractmethod
    def advance(self, now: float) -> float | None:
        """Handles transport events and time-outs and runs commands. Returns when it is due again. The lock is held."""

    @abstractmethod
    def _sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns all sockets, to be closed."""

    @abstractmethod
    def _take_one(self, socket: zmq.Socket[bytes]) -> None:
        """Receives one message without blocking and handles it; raises ``zmq.Again`` if there is none."""

    @abstractmethod
    def _send_to(self, peer: object, message: Message) -> None:
        """Sends without blocking; raises ``zmq.Again`` when it cannot."""

    def wake(self) -> None:
        """Wakes the thread. Any thread; never blocks."""
        if not self._closing and not self._woken:
            self._woken = True  # until the thread has woken; setting it twice does no harm
            os.eventfd_write(self._wake_fd, 1)

    @staticmethod
    def now() -> float:
        """Returns the time of the state machines, in seconds."""
        return time.monotonic()

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """Makes a socket that lingers briefly, rejects long messages and queues a bounded number."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def drop_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Closes a socket; queued messages are still sent for up to ``LINGER_MS``. Driver thread only."""
        self._poller.unregister(socket)
        socket.close()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def check(self) -> None:
        """Checks that the driver runs.

        Raises:
            LocalProtocolError: It is closed, or was stopped by a bug.
        """
        if self.fault is not None:
            raise LocalProtocolError(f"the transfer thread has stopped: {self.fault!r}; restart this worker")
        if self._closing:
            raise LocalProtocolError("this manager is closed")

    def collapsed(self) -> None:
        """The thread was stopped by a bug: notifies every handle. The lock is held."""

    def stop(self) -> None:
        """Ends the thread and closes the sockets. Idempotent."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.is_alive():
            self._thread.join()
        for socket in self._sockets():
            socket.close()
        self._context.term()
        with self.lock:  # a subclass whose wake() holds it never writes to a closed descriptor
            os.close(self._wake_fd)

    def _run(self) -> None:
        try:
            due: float | None = None
            while not self._closing:
                due = self._turn(due)
            self._flush()
        except Exception as error:
            log.critical("the transfer thread has stopped; this is a bug", exc_info=error)
            with self.lock:
                self.fault = error
                self.collapsed()

    def _turn(self, due: float | None) -> float | None:
        wait = IDLE_SECONDS if due is None else min(max(0.0, due - self.now()), IDLE_SECONDS)
        for source, _ in self._poller.poll(math.ceil(wait * 1000)):
            if isinstance(source, zmq.Socket):
                self._take_in(source)
            else:
                os.eventfd_read(self._wake_fd)
                self._woken = False  # before anything is handled: a later event wakes the thread again
        with self.lock:
            due = self.advance(self.now())
        self._flush()
        return due

    def _take_in(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(BATCH):
            try:
                self._take_one(socket)
            except zmq.Again:
                return

    def _flush(self) -> None:
        while self._outbox:
            peer, message = self._outbox.popleft()
            try:
                self._send_to(peer, message)
            except zmq.ZMQError:
                self.dropped_messages += 1  # the machines repeat every request until it is answered


class Driver(DriverThread[bytes]):
    """Drives transfers of our own protocol. A message is an encoded :class:`Frame`."""

    @abstractmethod
    def take(self, peer: object, frame: Frame, now: float) -> None:
        """Handles a control message from ``peer``. The lock is held."""

    @abstractmethod
    def _receive_from(self, socket: zmq.Socket[bytes]) -> tuple[object, bytes]:
        """Returns one message as (peer, bytes), without blocking; raises ``zmq.Again`` if there is none."""

    def send(self, peer: object, source: int, target: int, body: Body) -> None:
        """Queues a control message."""
        self._outbox.append((peer, encode(Frame(VERSION, source, target, body))))

    def _take_one(self, socket: zmq.Socket[bytes]) -> None:
        peer, data = self._receive_from(socket)
        try:
            frame = decode(data)
            with self.lock:
                self.take(peer, frame, self.now())
        except EmbeddingTransferError as error:
            # a bad message is logged and dropped; it harms no other transfer
            log.warning("dropped a control message from %r: %s", peer, error)


def bind(socket: zmq.Socket[bytes], host: str, port: int) -> str:
    """Binds to ``host:port`` (0: any free one). Returns the endpoint that peers connect to.

    Raises:
        TransportError: The address cannot be bound.
    """
    try:
        socket.bind(tcp_endpoint(host, port or "*"))
    except zmq.ZMQError as error:
        why = f"cannot listen on {host}:{port}: {error}; choose another port or host"
        raise TransportError(why, retryable=False) from None
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def tcp_endpoint(host: str, port: int | str) -> str:
    """Returns ZeroMQ's name of a TCP address. An IPv6 address gets brackets."""
    return f"tcp://[{host.strip('[]')}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def check_endpoint(endpoint: str) -> str:
    """Returns ``endpoint`` if it is well-formed.

    Raises:
        LocalProtocolError: It is not of the form ``tcp://host:port``.
    """
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LocalProtocolError(f"{endpoint!r} is not a control endpoint; it looks like tcp://10.0.0.7:5555")
    return endpoint
