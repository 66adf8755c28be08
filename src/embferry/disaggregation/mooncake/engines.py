"""The encode side's engines: one for each session that is written to, so that a failure harms that session alone."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from embferry.protocol.errors import TransportError
from embferry.transports.leased.engine_thread import EngineThread
from embferry.transports.leased.jobs import Run, WriteJob
from embferry.transports.leased.mooncake.write_engine import MooncakeWriteEngine

from .manager import OpenEngine

log = logging.getLogger(__name__)

MAX_IDLE = 16  # engines kept for sessions that nothing is written to

Over = Callable[[str], None]
"""Told once that a write is over, on any thread; with why its bytes are not there, or with nothing."""


@dataclass(eq=False, slots=True)
class _EnginePath:
    thread: EngineThread | None = None
    under_way: dict[int, Over] = field(default_factory=dict)
    error: str = "the encode side is ending"
    ended: bool = False


class Engines:
    """Thread-safe.

    A write that failed leaves its session usable: :class:`MooncakeWriteEngine` exchanges the engine as soon as nothing
    is under way, and an engine that is stuck or did not start is replaced at the next write.
    """

    def __init__(self, open_engine: OpenEngine, register_sources: bool) -> None:
        self._open_engine, self._register_sources = open_engine, register_sources
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._transports: OrderedDict[str, _EnginePath] = OrderedDict()
        self._retired: set[_EnginePath] = set()
        self._closed = False

    def write(self, session: str, slices: list[Run], source: object, over: Over) -> None:
        """Begins to write; ``over`` is told when no byte of ``source`` is read any more, and never before.

        :param slices: from which address of ours to which of theirs, how many bytes.
        """
        job = WriteJob(next(self._keys), lambda: slices, keeps=source)
        job.go = True
        with self._lock:
            closed = self._closed
            if not closed:
                transport = self._transport(session)
                transport.under_way[job.serial] = over
                assert transport.thread is not None
                transport.thread.put(job)
        if closed:
            over("the encode side is ending")

    def forget(self, session: str) -> None:
        """What was learned of the engine at this address is no longer true."""
        with self._lock:
            transport = self._transports.pop(session, None)
            if transport is not None:
                self._retire(transport)

    def close(self) -> None:
        """Ends every engine, then says of each write that it is over. Idempotent."""
        with self._lock:
            self._closed = True
            transports = [*self._transports.values(), *self._retired]
            self._transports.clear()
            for transport in transports:
                self._retire(transport)
        for transport in transports:
            if transport.thread is not None:
                transport.thread.join()

    def _transport(self, session: str) -> _EnginePath:
        transport = self._transports.get(session)
        if transport is None or transport.ended:
            transport = self._transports[session] = _EnginePath()
            transport.thread = EngineThread(
                "embferry-origin-engine",
                partial(MooncakeWriteEngine, self._open_engine, session, self._register_sources),
                on_over=partial(self._on_over, transport),
                on_end=partial(self._on_end, transport),
                on_bug=lambda _: None,  # which on_end tells as well
            )
            transport.thread.start()
        self._transports.move_to_end(session)
        idle = [name for name, other in self._transports.items() if not other.under_way and other is not transport]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(self._transports.pop(name))
        return transport

    def _retire(self, transport: _EnginePath) -> None:
        self._retired.add(transport)
        if transport.thread is not None:
            transport.thread.stop()

    # On an engine's thread

    def _on_over(self, transport: _EnginePath, job: WriteJob) -> None:
        with self._lock:
            over = transport.under_way.pop(job.serial)
        over("" if job.error is None else job.error.detail)

    def _on_end(self, transport: _EnginePath, error: TransportError | None, _: bool) -> None:
        if error is not None:
            log.warning("an engine is given up: %s", error.detail)
            transport.error = error.detail
        with self._lock:
            transport.ended = True
            self._retired.discard(transport)
            left, transport.under_way = list(transport.under_way.values()), {}
        for over in left:
            over(transport.error)
