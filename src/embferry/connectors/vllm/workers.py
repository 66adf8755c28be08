"""The scheduler's end of the channel: takes what workers publish, and gives the ranks the memory that they will load.

A request runs only when every rank has mapped its embeddings, because vLLM cannot fail it afterwards: the runner has no
result for a missing embedding, and its prefix cache would keep what was computed with a wrong one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from embferry import EmbeddingTransferError, LocalProtocolError, RemoteProtocolError, TransportError
from embferry.transfer.failures import as_transfer_error, attempt
from embferry.transports.net.loop import READ, WRITE, LoopThread, Scope

from ..shared.shared_rows import SharedRows
from . import channel
from .channel import Done, Enlist, Map, Publish, Unmap

if TYPE_CHECKING:
    from .other_hosts import Dropped, OtherHosts

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Connections of workers at a time: more than the ranks on one host."""
IDLE_S = 30.0
"""Longest time without a packet on a connection that is not a rank's."""
MAP_S = 10.0
"""How long a rank may take to map an embedding."""
ACCEPT_PAUSE_S = 0.1
PACKETS_AT_ONCE = 16
MAX_UNSENT = 1 << 16
"""Packets queued for a rank that does not read; beyond that, its connection ends."""


@dataclass(eq=False, slots=True)
class _Sharing:
    """Memory that the ranks are asked to map.

    Attributes:
        fd: A descriptor of it, until every rank has mapped it.
        missing: The ranks that have not.
        until: When they have to.
        on_end: Called on the channel's thread when every rank has mapped it, or one could not.
        error: Why a rank could not.
    """

    rows: SharedRows
    fd: int
    missing: set[int]
    until: float
    on_end: Callable[[], object]
    error: EmbeddingTransferError | None = None


@dataclass(eq=False, slots=True)
class _Connection:
    sock: socket.socket
    scope: Scope
    rank: int | None = None
    heard_at: float = field(default_factory=time.monotonic)
    unsent: deque[tuple[msgspec.Struct, int]] = field(default_factory=deque)  # with the key whose memory goes along


class Workers:
    """The workers of one engine, as its scheduler sees them. Any thread may call the methods.

    Attributes:
        on_publish: Takes what a worker publishes, and owns the descriptor. Runs on the channel's thread. What it raises
            is the worker's answer.
    """

    def __init__(self, name: str, ranks: int, others: OtherHosts | None = None) -> None:
        """Starts to listen. ``ranks`` is the number of ranks on this host that load embeddings.

        ``others`` are the hosts with further ranks of the engine; None: there are none. They are closed with this.

        Raises:
            TransportError: The engine's name is taken on this host.
        """
        self.ranks, self._others = ranks, others
        self.on_publish: Callable[[Publish, int], object] = _refuse
        self._lock = threading.Lock()  # guards the two below
        self._sharings: dict[int, _Sharing] = {}
        self._gone: set[int] = set()  # ranks whose process has ended
        self._connections: set[_Connection] = set()
        self._sock = channel.new_socket()
        try:
            self._sock.bind(channel.address(name))
            self._sock.listen(128)
            self._sock.setblocking(False)
            self._thread = LoopThread("embferry-workers", lambda error: None)
        except OSError as error:
            self._sock.close()
            raise TransportError(f"cannot listen to the workers of the engine {name}: {error}") from error
        self._loop = self._thread.loop
        self._thread.call(self._watch)
        self._thread.call(self._end_idle)

    def share(self, rows: SharedRows, on_end: Callable[[], object] = lambda: None) -> None:
        """Asks every rank to map the memory, once. It may be closed meanwhile.

        ``on_end`` is called on the channel's thread, without locks, when :meth:`is_mapped` becomes true or raises. It
        may not block.

        Raises:
            OSError: No descriptor is left.
        """
        with self._lock:
            if rows.key in self._sharings:
                return
            missing, until = set(range(self.ranks)), time.monotonic() + MAP_S
            error = _is_gone(min(self._gone)) if self._gone else None
            self._sharings[rows.key] = _Sharing(rows, rows.duplicate(), missing, until, on_end, error)
        rows.on_close = partial(self._withdraw, rows.key)
        self._thread.call(partial(self._send_all, Map(rows.key, rows.shape, self.ranks), rows.key))

    def complete(self, rows: SharedRows, on_end: Callable[[], object] = lambda: None) -> None:
        """Brings shared memory, which has its final content now, to the ranks on other hosts, once.

        ``on_end`` is called as in :meth:`share`, on a thread of the manager that sends it or on the caller's.
        """
        if self._others is not None:
            self._others.send(rows, on_end)

    def rooms(self, rows: SharedRows) -> tuple[int, ...]:
        """Returns the keys of mapped memory on hosts 1, 2 and so on."""
        return () if self._others is None else self._others.rooms(rows)

    def dropped(self, *, repeat: bool) -> tuple[Dropped, ...]:
        """Returns the memory that other hosts are to drop; with ``repeat``, again the next time."""
        return () if self._others is None else self._others.dropped(repeat=repeat)

    def is_mapped(self, rows: SharedRows) -> bool:
        """Returns whether every rank has mapped the memory, so that a load of it can begin.

        Raises:
            EmbeddingTransferError: A rank cannot map it.
        """
        return self.is_mapped_here(rows) and (self._others is None or self._others.is_there(rows))

    def is_mapped_here(self, rows: SharedRows) -> bool:
        """Returns whether every rank on this host has mapped the memory. Raises as :meth:`is_mapped`."""
        with self._lock:
            sharing = self._sharings.get(rows.key)
            if sharing is None:
                return False
            if sharing.error is None and sharing.missing and time.monotonic() > sharing.until:
                ranks = ", ".join(map(str, sorted(sharing.missing)))
                why = f"rank {ranks} did not map an embedding within {MAP_S:g} s; does it run on this host?"
                sharing.error = TransportError(why)
            if sharing.error is not None:
                raise sharing.error
            return not sharing.missing

    def later(self, delay_s: float, call: Callable[[], object]) -> None:
        """Calls ``call`` after ``delay_s`` seconds on the channel's thread, unless this is closed by then."""
        self._thread.call(lambda: self._thread.later(delay_s, call))

    def close(self) -> None:
        if self._others is not None:
            self._others.close()
        self._thread.call(self._shut)
        self._thread.close()
        with self._lock:
            for sharing in self._sharings.values():
                _close(sharing)
            self._sharings.clear()

    def _withdraw(self, key: int) -> None:
        with self._lock:
            sharing = self._sharings.pop(key, None)
            if sharing is not None:
                _close(sharing)
        self._thread.call(partial(self._send_all, Unmap(key), 0))
        if self._others is not None:
            self._others.withdraw(key)

    # The channel's thread

    def _shut(self) -> None:
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        for connection in list(self._connections):
            self._end(connection)

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.watch(self._sock.fileno(), READ, self._accept)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors are left, perhaps; without a pause this would spin
            log.warning("could not accept a worker, trying again in %s s: %s", ACCEPT_PAUSE_S, error)
            self._loop.unwatch(self._sock.fileno())
            self._loop.later(ACCEPT_PAUSE_S, self._watch)
            return
        sock.setblocking(False)
        refusal = attempt(channel.check_user, sock)
        if refusal is None and len(self._connections) >= MAX_CONNECTIONS:
            refusal = TransportError(f"{MAX_CONNECTIONS} workers are connected")
        if refusal is not None:
            log.warning("refused a worker: %s", refusal)
            attempt(channel.send, sock, _answer(0, refusal))
            sock.close()
            return
        connection = _Connection(sock, self._loop.scope(lambda error: self._end(connection)))
        self._connections.add(connection)
        connection.scope.watch(sock.fileno(), READ, partial(self._ready, connection))

    def _end_idle(self) -> None:
        now = time.monotonic()
        for connection in [one for one in self._connections if one.rank is None and now - one.heard_at > IDLE_S]:
            self._end(connection)
        self._loop.later(IDLE_S, self._end_idle)

    def _end(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        connection.scope.end()
        connection.sock.close()
        if connection.rank is None:
            return
        with self._lock:
            ended = [sharing for sharing in self._sharings.values() if connection.rank in sharing.missing]
            for sharing in ended:
                sharing.error = sharing.error or _is_gone(connection.rank)
                _close(sharing)
            self._gone.add(connection.rank)
        for sharing in ended:
            attempt(sharing.on_end)

    def _ready(self, connection: _Connection, events: int) -> None:
        if events & WRITE:
            self._flush(connection)
        for _ in range(PACKETS_AT_ONCE):
            try:
                received = channel.receive(connection.sock, channel.from_worker)
            except BlockingIOError:
                return
            except RemoteProtocolError as error:
                log.error("a worker has sent a malformed packet: %s", error)
                attempt(channel.send, connection.sock, _answer(0, error))
                received = None
            except OSError as error:
                log.info("a worker's connection has ended: %s", error)
                received = None
            if received is None:
                self._end(connection)
                return
            connection.heard_at = time.monotonic()
            self._take(connection, *received)

    def _take(self, connection: _Connection, packet: channel.FromWorker, fd: int | None) -> None:
        match packet:
            case Publish() if fd is not None:
                error = attempt(self.on_publish, packet, fd)
                if error is not None:
                    log.error("cannot take an embedding from a worker: %s", error)
                self._send(connection, _answer(0, error))
                return
            case Publish():
                self._send(connection, _answer(0, RemoteProtocolError("no memory came with the embedding")))
            case Enlist(rank, secret) if rank < self.ranks and connection.rank is None:
                self._enlist(connection, rank, secret)
            case Enlist(rank):
                self._send(connection, _answer(0, RemoteProtocolError(f"there are {self.ranks} ranks, not {rank}")))
            case Done(key, problem):
                self._mapped(connection, key, problem)
        if fd is not None:
            os.close(fd)

    def _enlist(self, connection: _Connection, rank: int, secret: str) -> None:
        connection.rank = rank
        if self._others is not None and secret:
            self._others.admit(secret)
        with self._lock:
            self._gone.discard(rank)
            waiting = [sharing.rows for sharing in self._sharings.values() if rank in sharing.missing]
        for rows in waiting:
            self._send(connection, Map(rows.key, rows.shape, self.ranks), rows.key)

    def _mapped(self, connection: _Connection, key: int, problem: str) -> None:
        with self._lock:
            sharing = self._sharings.get(key)
            if sharing is None or connection.rank is None:
                return
            if problem:
                why = f"rank {connection.rank} cannot map an embedding: {problem}"
                log.error(why)
                sharing.error = sharing.error or TransportError(why)
            else:
                sharing.missing.discard(connection.rank)
            if sharing.error is None and sharing.missing:
                return
            _close(sharing)
        attempt(sharing.on_end)

    def _send_all(self, packet: msgspec.Struct, key: int) -> None:
        for connection in list(self._connections):
            if connection.rank is not None:
                self._send(connection, packet, key)

    def _send(self, connection: _Connection, packet: msgspec.Struct, key: int = 0) -> None:
        """Sends a packet, with the memory of ``key`` unless that is 0."""
        if len(connection.unsent) >= MAX_UNSENT:
            self._end(connection)
            return
        connection.unsent.append((packet, key))
        if len(connection.unsent) == 1:
            self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        while connection.unsent:
            packet, key = connection.unsent[0]
            try:
                self._send_now(connection.sock, packet, key)
            except BlockingIOError:
                break
            except OSError as error:
                log.info("a worker's connection has ended: %s", error)
                connection.unsent.clear()  # reading finds the end as well, and removes it
                return
            connection.unsent.popleft()
        wanted = READ | WRITE if connection.unsent else READ
        connection.scope.watch(connection.sock.fileno(), wanted, partial(self._ready, connection))

    def _send_now(self, sock: socket.socket, packet: msgspec.Struct, key: int) -> None:
        if not key:
            channel.send(sock, packet)
            return
        with self._lock:  # no other thread closes the descriptor meanwhile
            sharing = self._sharings.get(key)
            if sharing is not None and sharing.fd >= 0:
                channel.send(sock, packet, sharing.fd)


def _close(sharing: _Sharing) -> None:
    """Closes the descriptor. The lock is held."""
    if sharing.fd >= 0:
        os.close(sharing.fd)
        sharing.fd = -1


def _is_gone(rank: int) -> TransportError:
    return TransportError(f"rank {rank} of this engine is gone")


def _answer(key: int, error: Exception | None) -> Done:
    text = "" if error is None else str(as_transfer_error("taking it", error).detail)
    return Done(key, text[: channel.MAX_REASON].encode("utf-8", "replace").decode())


def _refuse(published: Publish, fd: int) -> None:
    os.close(fd)
    raise LocalProtocolError("this engine is no producer")
