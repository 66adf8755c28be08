"""Engines of the encode side: one for each session that is written to, so that a failure stays in its session."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from embferry.protocol.errors import TransportError
from embferry.transports.leased.engine_thread import EngineThread, WriteEngine
from embferry.transports.leased.jobs import Run, WriteJob
from embferry.transports.leased.mooncake.engine import Engine
from embferry.transports.leased.mooncake.write_engine import MooncakeWriteEngine

log = logging.getLogger(__name__)

MAX_IDLE = 16  # engines kept for sessions without a write
SHUTTING_DOWN = "the encode side is shutting down"

OpenEngine = Callable[[], Engine]

OnOver = Callable[[str], None]
"""Called once when a write is over, on any thread, with the reason of its failure or an empty string.

No lock of this module is held. The callback may not block.
"""


class _SessionEngine(EngineThread):
    """The engine of one session. The lock of :class:`SessionEngines` guards its fields."""

    def __init__(self, engines: SessionEngines, open_engine: Callable[[], WriteEngine]) -> None:
        super().__init__(
            "embferry-origin-engine",
            open_engine,
            on_over=partial(engines.on_job_over, self),
            on_end=partial(engines.on_engine_end, self),
        )
        self.jobs: dict[WriteJob, OnOver] = {}
        self.error = SHUTTING_DOWN
        self.ended = False


class SessionEngines:
    """The engines by session id. Thread-safe.

    A failed write leaves its session usable: the engine is replaced as soon as no write is in flight. An engine that
    is stuck or did not start is replaced at the next write.
    """

    def __init__(self, open_engine: OpenEngine, register_sources: bool) -> None:
        self._open_engine, self._register_sources = open_engine, register_sources
        self._lock = threading.Lock()
        self._engines: OrderedDict[str, _SessionEngine] = OrderedDict()
        self._retired: set[_SessionEngine] = set()
        self._closed = False

    def write(self, session: str, runs: list[Run], source: object, on_over: OnOver) -> None:
        """Begins a write to absolute addresses of the peer.

        ``source`` keeps the memory of ``runs`` alive until ``on_over`` is called, when no byte of it is read any more.
        """
        job = WriteJob(lambda: runs, keeps=source)
        job.go = True
        with self._lock:
            closed = self._closed
            if not closed:
                engine = self._engine(session)
                engine.jobs[job] = on_over
                engine.put(job)
        if closed:
            on_over(SHUTTING_DOWN)

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
            engine.join()

    def _engine(self, session: str) -> _SessionEngine:
        engine = self._engines.get(session)
        if engine is None or engine.ended:
            opens = partial(MooncakeWriteEngine, self._open_engine, session, self._register_sources)
            engine = self._engines[session] = _SessionEngine(self, opens)
            engine.start()
        self._engines.move_to_end(session)
        idle = [name for name, other in self._engines.items() if not other.jobs and other is not engine]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(self._engines.pop(name))
        return engine

    def _retire(self, engine: _SessionEngine) -> None:
        self._retired.add(engine)
        engine.stop()

    # On the thread of an engine

    def on_job_over(self, engine: _SessionEngine, job: WriteJob) -> None:
        with self._lock:
            on_over = engine.jobs.pop(job)
        on_over("" if job.error is None else job.error.detail)

    def on_engine_end(self, engine: _SessionEngine, error: TransportError | None, _: bool) -> None:
        if error is not None:
            log.warning("an engine failed and will be replaced: %s", error.detail)
            engine.error = error.detail
        with self._lock:
            engine.ended = True
            self._retired.discard(engine)
            left, engine.jobs = list(engine.jobs.values()), {}
        for on_over in left:
            on_over(engine.error)
