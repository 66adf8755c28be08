"""Which encode rank serves a room, and whether its bootstrap server still answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from embferry.discovery.bootstrap_client import BootstrapClient, Shape
from embferry.protocol.errors import EmbeddingTransferError, PeerGone, RemoteProtocolError, TransportError

from .settings import OriginSettings

log = logging.getLogger(__name__)

RETRY_S = 0.2
IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class EncodeRank:
    """The encode rank that serves a room to this rank."""

    host: str
    port: int
    required_dst_info_num: int  # language ranks that ask it for the same room


OnFound = Callable[[EncodeRank | EmbeddingTransferError], None]
"""Called with the result of a look-up, on the thread of :class:`EncodeSide`. No lock is held."""

LookUp = tuple[int, float, OnFound]
"""A room, and the deadline of its look-up on the monotonic clock."""


def rank_for(shape: Shape, settings: OriginSettings, room: int) -> tuple[int, int, int]:
    """Chooses the encode rank for a room: returns it, its data-parallel group, and ``required_dst_info_num``.

    The ranks of a group hold the same embeddings, so one of them is asked. If the encode side has more ranks in a group
    than the language side, several of them belong to this rank, and only the first is asked. Sizes that do
    not divide each other raise :class:`RemoteProtocolError`.
    """
    if shape.embedding_tp_size < 1 or shape.embedding_dp_size < 1:
        raise RemoteProtocolError(f"the encode side reports impossible sizes: {shape}")
    theirs = shape.embedding_tp_size // shape.embedding_dp_size
    ours = settings.tp_size // settings.dp_size
    if theirs < 1 or max(ours, theirs) % min(ours, theirs):
        raise RemoteProtocolError(f"{theirs} encode ranks a group cannot serve {ours}; choose sizes that divide")
    rank, group = settings.engine_rank % ours, room % shape.embedding_dp_size
    if ours >= theirs:
        return rank // (ours // theirs), group, ours // theirs
    return rank * (theirs // ours), group, 1


class EncodeSide:
    """A thread that asks one bootstrap server for encode ranks and for its health.

    Args:
        url: URL of the bootstrap server; another one raises :class:`LocalProtocolError`.
        settings: Settings of this rank.
        on_miss: Called when the server did not answer once. Another server that knows no registrations may run there
            now.
        on_lost: Called when the server did not answer ``max_misses`` times in a row. Both callbacks run on the thread
            of this object, without a lock.
    """

    def __init__(
        self, url: str, settings: OriginSettings, on_miss: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        self._client = BootstrapClient(url, must_prove=False)
        self._settings, self._on_miss, self._on_lost = settings, on_miss, on_lost
        self._stopping = False
        self._misses = 0  # unanswered requests of its health in a row
        self._new: SimpleQueue[LookUp | None] = SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._run, name=f"embferry-origin {url}", daemon=True)
        self._thread.start()

    def find(self, room: int, deadline: float, on_found: OnFound) -> None:
        """Looks up the encode rank of a room until ``deadline``, then fails with :class:`PeerGone`."""
        self._new.put((room, deadline, on_found))

    def leave(self) -> None:
        """Has the thread end after the call of the client that it is making."""
        self._stopping = True
        self._new.put(None)

    def stop(self) -> None:
        """Ends the thread. Waits for one call of the client at most."""
        self.leave()
        self._thread.join()

    def _run(self) -> None:
        next_check = math.inf  # of its health; a server that never answered cannot be lost
        pending: list[LookUp | None] = []
        while not self._stopping:
            pause = min(RETRY_S if pending else IDLE_S, max(0.0, next_check - time.monotonic()))
            with suppress(Empty):
                pending.append(self._new.get(timeout=pause))
                while True:
                    pending.append(self._new.get_nowait())
            asked = [look_up for look_up in pending if look_up is not None]
            if len(asked) < len(pending):
                return
            pending = [*self._look_up(asked)]
            if len(pending) < len(asked) and next_check == math.inf:
                next_check = time.monotonic() + self._settings.heartbeat_interval
            if time.monotonic() >= next_check and not self._stopping:
                lost = self._check_health()
                next_check = math.inf if lost else time.monotonic() + self._settings.heartbeat_interval

    def _look_up(self, asked: list[LookUp]) -> list[LookUp]:
        """Returns the look-ups that have to be tried again."""
        found: dict[tuple[int, int], EncodeRank] = {}
        shape: Shape | None = None
        silent: TransportError | None = None  # of the server, which is asked once a pass then
        pending: list[LookUp] = []
        for room, deadline, on_found in asked:
            if self._stopping:
                break
            try:
                if silent is not None:
                    raise silent
                shape = shape or self._client.shape()
                rank, group, ranks = rank_for(shape, self._settings, room)
                if (rank, group) not in found:
                    at = self._client.route(rank, group)
                    found[rank, group] = EncodeRank(at.rank_ip, at.rank_port, ranks)
                on_found(found[rank, group])
            except EmbeddingTransferError as error:
                if isinstance(error, TransportError):
                    silent = error
                if not error.retryable:
                    on_found(error)
                elif time.monotonic() < deadline:
                    pending.append((room, deadline, on_found))
                else:
                    on_found(PeerGone(f"no encode side was found in time: {error.detail}"))
        return pending

    def _check_health(self) -> bool:
        """Asks for the health once. Returns whether the encode side is lost."""
        self._misses = 0 if self._client.healthy() else self._misses + 1
        if self._misses >= self._settings.max_misses:
            log.warning("the encode side at %s is lost: %d misses", self._client.url, self._misses)
            self._misses = 0
            self._on_lost()
            return True
        if self._misses:
            self._on_miss()
        return False
