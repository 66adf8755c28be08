"""Engines of the encode side: one for each session that is written to, so that a failure stays in its session."""

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
from embferry.transports.leased.mooncake.engine import Engine
from embferry.transports.leased.mooncake.write_engine import MooncakeWriteEngine

log = logging.getLogger(__name__)

MAX_IDLE = 16  # engines kept for sessions without a write

OpenEngine = Callable[[], Engine]

OnOver = Callable[[str], None]
"""Called once when a write is over, on any thread, with the reason of its failure or an empty string.

No lock of this module is held. The callback may not block.
"""


@dataclass(eq=False, slots=True)
class _SessionEngine:
    """The engine of one session, on a thread of its own."""

    thread: EngineThread | None = None
    in_flight: dict[int, OnOver] = field(default_factory=dict)
    error: str = "the encode side is shutting down"
    ended: bool = False


class SessionEngines:
    """The engines by session id. Thread-safe.

    A failed write leaves its session usable: the engine is replaced as soon as no write is in flight. An engine that
    is stuck or did not start is replaced at the next write.
    """

    def __init__(self, open_engine: OpenEngine, register_sources: bool) -> None:
        self._open_engine, self._register_sources = open_engine, register_sources
        self._serials = itertools.count(1)
        self._lock = threading.Lock()
        self._engines: OrderedDict[str, _SessionEngine] = OrderedDict()
        self._retired: set[_SessionEngine] = set()
        self._closed = False

    def write(self, session: str, runs: list[Run], source: object, on_over: OnOver) -> None:
        """Begins a write to absolute addresses of the peer.

        ``source`` keeps the memory of ``runs`` alive until ``on_over`` is called, when no byte of it is read any more.
        """
        job = WriteJob(next(self._serials), lambda: runs, keeps=source)
        job.go = True
        with self._lock:
            closed = self._closed
            if not closed:
                engine = self._engine(session)
                engine.in_flight[job.serial] = on_over
                assert engine.thread is not None
                engine.thread.put(job)
        if closed:
            on_over("the encode side is shutting down")

    def forget(self, session: str) -> None:
        """Retires the engine of a session: another engine may have the peer's address now."""
        with self._lock:
            engine = self._engines.pop(session, None)
            if engine is not None:
                self._retire(engine)

    def close(self) -> None:
        """Ends every engine, then reports each write that was in flight as over. Idempotent."""
        with self._lock:
            self._closed = True
            engines = [*self._engines.values(), *self._retired]
            self._engines.clear()
            for engine in engines:
                self._retire(engine)
        for engine in engines:
            if engine.thread is not None:
                engine.thread.join()

    def _engine(self, session: str) -> _SessionEngine:
        engine = self._engines.get(session)
        if engine is None or engine.ended:
            engine = self._engines[session] = _SessionEngine()
            engine.thread = EngineThread(
                "embferry-origin-engine",
                partial(MooncakeWriteEngine, self._open_engine, session, self._register_sources),
                on_over=partial(self._on_job_over, engine),
                on_end=partial(self._on_engine_end, engine),
                on_bug=lambda _: None,  # on_end gets the error as well
            )
            engine.thread.start()
        self._engines.move_to_end(session)
        idle = [name for name, other in self._engines.items() if not other.in_flight and other is not engine]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(self._engines.pop(name))
        return engine

    def _retire(self, engine: _SessionEngine) -> None:
        self._retired.add(engine)
        if engine.thread is not None:
            engine.thread.stop()

    # On the thread of an engine

    def _on_job_over(self, engine: _SessionEngine, job: WriteJob) -> None:
        with self._lock:
            on_over = engine.in_flight.pop(job.serial)
        on_over("" if job.error is None else job.error.detail)

    def _on_engine_end(self, engine: _SessionEngine, error: TransportError | None, _: bool) -> None:
        if error is not None:
            log.warning("an engine failed and will be replaced: %s", error.detail)
            engine.error = error.detail
        with self._lock:
            engine.ended = True
            self._retired.discard(engine)
            left, engine.in_flight = list(engine.in_flight.values()), {}
        for on_over in left:
            on_over(engine.error)
