"""Engines of the encode side: one for each session that is written to, so that a failure stays in its session."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from embferry.protocol.errors import TransportError
from embferry.transports.leased.engine_thread import EngineThread
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
    """The engine of one session. Its callbacks run on its thread; ``lock`` guards its fields."""

    def __init__(self, lock: threading.Lock, open_engine: Callable[[], MooncakeWriteEngine]) -> None:
        super().__init__("embferry-origin-engine", open_engine, on_over=self._job_over, on_end=self._engine_over)
        self._lock = lock
        self.jobs: dict[WriteJob, OnOver] = {}
        self.ended = False

    def _job_over(self, job: WriteJob) -> None:
        with self._lock:
            on_over = self.jobs.pop(job)
        on_over("" if job.error is None else job.error.detail)

    def _engine_over(self, error: TransportError | None, _: bool) -> None:
        if error is not None:
            log.warning("an engine failed and will be replaced: %s", error.detail)
        with self._lock:
            self.ended = True
            left, self.jobs = list(self.jobs.values()), {}
        for on_over in left:
            on_over(SHUTTING_DOWN if error is None else error.detail)


class SessionEngines:
    """The engines by session id. Thread-safe.

    A failed write leaves its session usable: the engine is replaced as soon as no write is in flight. An engine that
    is stuck or did not start is replaced at the next write.
    """

    def __init__(self, open_engine: OpenEngine, register_sources: bool) -> None:
        self._open_engine, self._register_sources = open_engine, register_sources
        self._lock = threading.Lock()
        self._engines: OrderedDict[str, _SessionEngine] = OrderedDict()  # the most recently used last
        self._retired: list[_SessionEngine] = []
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
            if session in self._engines:
                self._retire(session)

    def close(self) -> None:
        """Ends every engine, then reports each write that was in flight as over. Idempotent."""
        with self._lock:
            self._closed = True
            for session in list(self._engines):
                self._retire(session)
        for engine in self._retired:
            engine.join()

    def _engine(self, session: str) -> _SessionEngine:
        engine = self._engines.get(session)
        if engine is None or engine.ended:
            opens = partial(MooncakeWriteEngine, self._open_engine, session, self._register_sources)
            engine = self._engines[session] = _SessionEngine(self._lock, opens)
            engine.start()
        self._engines.move_to_end(session)
        idle = [name for name, other in self._engines.items() if not other.jobs and other is not engine]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(name)
        return engine

    def _retire(self, session: str) -> None:
        engine = self._engines.pop(session)
        engine.stop()
        self._retired = [*(other for other in self._retired if not other.ended), engine]
