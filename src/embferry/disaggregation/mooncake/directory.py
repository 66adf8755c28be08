"""Where the ranks of an encode side are, and whether it is still there: its bootstrap server, asked on the side."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from embferry.discovery.bootstrap_client import BootstrapClient, HealthWatch, Shape
from embferry.discovery.leases import Rank
from embferry.protocol.errors import (
    CapacityError,
    EmbeddingTransferError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)

from .settings import OriginSettings

log = logging.getLogger(__name__)

RETRY_S = 0.2
IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """The encode rank that serves a room to this rank."""

    host: str
    port: int
    required_dst_info_num: int
    """How many ranks of the language side ask it for the same room."""


Found = Callable[[Target | EmbeddingTransferError], None]
Question = tuple[int, float, Found]
"""The room, until when to ask (monotonic), and who is told."""


def place(shape: Shape, settings: OriginSettings, room: int) -> tuple[int, int, int]:
    """(encode rank, its data-parallel group, required_dst_info_num) for a room and this rank of the language side.

    Ranks of a group hold the same embeddings, so one of them is asked. Where the encode side has the more ranks a
    group, the first of those that belong to this rank is; the others hear nothing.

    :raises RemoteProtocolError: the sizes of the two sides do not divide each other.
    """
    if shape.embedding_tp_size < 1 or shape.embedding_dp_size < 1:
        raise RemoteProtocolError(f"the encode side says its sizes are {shape}")
    theirs = shape.embedding_tp_size // shape.embedding_dp_size
    ours = settings.tp_size // settings.dp_size
    if theirs < 1 or max(ours, theirs) % min(ours, theirs):
        raise RemoteProtocolError(f"{theirs} encode ranks a group cannot serve {ours}; choose sizes that divide")
    rank, group = settings.engine_rank % ours, room % shape.embedding_dp_size
    if ours >= theirs:
        return rank // (ours // theirs), group, ours // theirs
    return rank * (theirs // ours), group, 1


class EncodeSide:
    """One bootstrap server: a thread that asks it for routes and looks after its health.

    :param on_miss: it did not answer once: it may be another one by now, which knows no registrations.
    :param on_lost: it did not answer ``max_misses`` times in a row. Both are called on the thread.
    :raises LocalProtocolError: ``url`` cannot be one.
    """

    def __init__(
        self, url: str, settings: OriginSettings, on_miss: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        self._client = BootstrapClient(url)
        self._settings, self._on_miss, self._on_lost = settings, on_miss, on_lost
        self._health = HealthWatch(settings.max_misses)
        self._changed = threading.Condition()  # of what follows
        self._wanted: list[Question] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"embferry-origin {url}", daemon=True)
        self._thread.start()

    def find(self, room: int, deadline: float, found: Found) -> None:
        """Tells ``found``, on the thread, where the room is served; after ``deadline`` (monotonic), that nobody is."""
        with self._changed:
            self._wanted.append((room, deadline, found))
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        look = math.inf  # when to look after its health: only who has been there can be missed
        again: list[Question] = []
        retry = math.inf
        while True:
            with self._changed:
                if not (self._stopping or self._wanted):
                    self._changed.wait(min(IDLE_S, max(0.0, min(look, retry) - time.monotonic())))
                if self._stopping:
                    return
                wanted, self._wanted = self._wanted, []
            if wanted or time.monotonic() >= retry:
                asked = again + wanted
                again = self._answer(asked)
                retry = time.monotonic() + RETRY_S if again else math.inf
                if len(again) < len(asked) and look == math.inf:
                    look = time.monotonic() + self._settings.heartbeat_interval
            if time.monotonic() >= look:
                look = math.inf if self._missed() else time.monotonic() + self._settings.heartbeat_interval

    def _answer(self, asked: list[Question]) -> list[Question]:
        """Those that have to be asked again."""
        routes: dict[tuple[int, int], Target] = {}
        shape: Shape | None = None
        again: list[Question] = []
        for room, deadline, found in asked:
            try:
                shape = shape or self._client.shape()
                rank, group, ranks = place(shape, self._settings, room)
                if (rank, group) not in routes:
                    at = self._client.route(rank, group)
                    routes[rank, group] = Target(at.rank_ip, at.rank_port, ranks)
            except (TransportError, PeerGone, CapacityError) as error:
                if time.monotonic() < deadline:
                    again.append((room, deadline, found))
                else:
                    found(PeerGone(f"no encode side was found in time: {error.detail}", room=room))
            except (LocalProtocolError, RemoteProtocolError) as error:
                found(error)
            else:
                found(routes[rank, group])
        return again

    def _missed(self) -> bool:
        """Looks after its health; whether it is given up."""
        healthy = self._client.healthy()
        gone = self._health.saw(healthy)
        if gone:
            log.warning("the encode side at %s is given up: %d misses", self._client.url, self._health.misses)
            self._health = HealthWatch(self._settings.max_misses)
            self._on_lost()
        elif not healthy:
            self._on_miss()
        return gone


class RouteKeeper:
    """A thread that keeps an encode rank registered: the origin's bootstrap server forgets when it is restarted."""

    def __init__(self, client: BootstrapClient, rank: Rank, interval_s: float) -> None:
        self._client, self._rank, self._interval_s = client, rank, interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embferry-origin route", daemon=True)

    def start(self) -> None:
        """Does not wait: the bootstrap server may be started later than the rank."""
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        failing = False
        while not self._stopping.is_set():
            try:
                self._client.register_rank(self._rank)
            except (TransportError, CapacityError, RemoteProtocolError, LocalProtocolError) as error:
                if not failing:
                    log.warning("the encode rank is not registered, and goes on trying: %s", error)
                failing = True
            else:
                failing = False
            self._stopping.wait(RETRY_S if failing else self._interval_s)
