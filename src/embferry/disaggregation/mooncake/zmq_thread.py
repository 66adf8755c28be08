"""The driver thread of the origin's wire, with its ZeroMQ sockets.

Only this thread touches the sockets. Other threads queue what they send and wake it, so public methods never block on
the network. One lock guards the state machines. Only :meth:`ZmqThread.stop` ends the thread: what a message, a time-out
or a socket raises is logged, and harms nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque

import zmq

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.transfer.control.endpoint import tcp_endpoint
from embferry.transfer.failures import attempt
from embferry.trust import Trust
from embferry.trust.policy import is_loopback

log = logging.getLogger(__name__)

HIGH_WATER = 65536  # messages queued for one peer; further ones are dropped, and repeated later
BATCH = 256  # messages handled before timers and writes get their turn
IDLE_SECONDS = 60.0
AFTER_BUG_SECONDS = 0.1  # pause after a turn that raised, so that a bug that recurs does not use up a core
LINGER_MS = 200  # so that the last abort still leaves


class ZmqThread(ABC):
    """The thread, its sockets and its outgoing messages.

    Calls :meth:`advance` whenever a message or a transport event has come or a time-out is due.
    """

    def __init__(self, name: str) -> None:
        self.lock = threading.RLock()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._outbox: deque[tuple[str, list[bytes]]] = deque()
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
    def _send_to(self, peer: str, message: list[bytes]) -> None:
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
            LocalProtocolError: It is closed.
        """
        if self._closing:
            raise LocalProtocolError("this manager is closed")

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
        due: float | None = None
        while not self._closing:
            self._wait(due)
            due = self._turn()
        self._flush()

    def _wait(self, due: float | None) -> None:
        wait = IDLE_SECONDS if due is None else min(max(0.0, due - self.now()), IDLE_SECONDS)
        for source, _ in self._poller.poll(math.ceil(wait * 1000)):
            if isinstance(source, zmq.Socket):
                self._take_in(source)
            else:
                os.eventfd_read(self._wake_fd)
                self._woken = False  # before anything is handled: a later event wakes the thread again

    def _turn(self) -> float | None:
        due: list[float | None] = [self.now() + AFTER_BUG_SECONDS]

        def advance() -> None:
            due[0] = self.advance(self.now())

        with self.lock:
            if (error := attempt(advance)) is not None:
                log.critical("a turn of the driver has failed; this is a bug", exc_info=error)
        self._flush()
        return due[0]

    def _take_in(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(BATCH):
            error = attempt(self._take_one, socket)
            if isinstance(error, zmq.Again):
                return
            if error is not None:
                log.error("a message could not be handled; this is a bug", exc_info=error)

    def _flush(self) -> None:
        while self._outbox:
            peer, message = self._outbox.popleft()
            attempt(self._send_to, peer, message)  # a message that cannot be sent is dropped, and repeated later


def bind(socket: zmq.Socket[bytes], host: str, port: int) -> str:
    """Binds to ``host:port`` (0: any free one). Returns the endpoint.

    Raises:
        TransportError: The address cannot be bound.
    """
    try:
        socket.bind(tcp_endpoint(host, port) if port else tcp_endpoint(host, 0)[:-1] + "*")
    except zmq.ZMQError as error:
        why = f"cannot listen on {host}:{port}: {error}; choose another port or host"
        raise TransportError(why, retryable=False) from None
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def check_listening(host: str) -> None:
    """Checks that a manager may listen on ``host``. Its peers prove nothing, also if there is a cluster key.

    Raises:
        LocalProtocolError: Strangers can reach it, and ``EMBFERRY_INSECURE`` does not allow that.
    """
    if not is_loopback(host) and not Trust.of_environment().insecure:
        raise LocalProtocolError(
            f"the origin's wire would listen on {host}, where strangers can reach it, and it knows no cluster key;"
            " allow strangers with EMBFERRY_INSECURE=1"
        )
