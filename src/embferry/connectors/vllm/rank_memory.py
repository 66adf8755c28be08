"""A rank's end of the channel: maps the memory that its scheduler will ask it to load."""

from __future__ import annotations

import logging
import os
import socket
import threading

from embferry import RemoteProtocolError, TransportError
from embferry.protocol.messages import sendable
from embferry.transfer.failures import attempt

from ..shared.shared_rows import SharedRows
from . import channel
from .channel import Done, Enlist, Map, Unmap

log = logging.getLogger(__name__)

CONNECT_S = 0.1
"""Time between two attempts to connect: vLLM starts the workers before the scheduler."""


class RankMemory:
    """Memory of the scheduler that this rank has mapped. A thread of its own maps and unmaps it."""

    def __init__(self, name: str, rank: int, secret: str = "") -> None:
        """Starts. ``secret`` is that of the engine, if its ranks are on several hosts."""
        self._name, self._rank, self._secret = name, rank, secret
        self._mapped: dict[int, SharedRows] = {}
        self._closing = threading.Event()
        self._sock: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="embferry-rank", daemon=True)
        self._thread.start()

    def find(self, key: int) -> SharedRows:
        """Returns mapped memory.

        Raises:
            TransportError: It is not mapped: the scheduler has ended.
        """
        shared = self._mapped.get(key)
        if shared is None:
            raise TransportError("an embedding is not mapped here; the scheduler of this engine has ended")
        return shared

    def close(self) -> None:
        self._closing.set()
        if (sock := self._sock) is not None:
            attempt(sock.shutdown, socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._sock = channel.connect(self._name, CONNECT_S)
            except (OSError, TransportError) as error:
                log.debug("rank %d cannot reach its scheduler yet: %s", self._rank, error)
                self._closing.wait(CONNECT_S)
                continue
            with self._sock as sock:
                if self._closing.is_set():  # close() may have come too early to see the socket
                    break
                sock.settimeout(None)
                if (lost := attempt(self._serve, sock)) is not None and not self._closing.is_set():
                    log.error("rank %d has lost its scheduler: %s", self._rank, lost)
            break
        self._mapped.clear()

    def _serve(self, sock: socket.socket) -> None:
        channel.send(sock, Enlist(self._rank, self._secret))
        while (received := channel.receive(sock, channel.from_scheduler)) is not None and not self._closing.is_set():
            packet, fd = received
            match packet:
                case Map() if fd is not None:
                    problem = attempt(self._map, packet, fd)
                    if problem is not None:
                        log.error("rank %d cannot map an embedding: %r", self._rank, problem)
                    text = "" if problem is None else sendable(repr(problem), channel.MAX_REASON)
                    channel.send(sock, Done(packet.key, text))
                case Unmap(key):
                    self._mapped.pop(key, None)
                case Done(_, problem):
                    raise RemoteProtocolError(problem)
                case _ if fd is not None:
                    os.close(fd)

    def _map(self, packet: Map, fd: int) -> None:
        shared = SharedRows.adopt(fd, packet.shape, packet.ranks)
        shared.close()  # the mapping stays
        self._mapped[packet.key] = shared
