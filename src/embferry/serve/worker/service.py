"""The work of a worker, without HTTP: open requests, one thread that computes, and an orderly end."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Generic, Protocol, TypeVar

import torch

from embferry.memory.limits import machine_memory_bytes
from embferry.observe.metrics import Metrics
from embferry.protocol.errors import CapacityError
from embferry.serve.byte_budget import ByteBudget
from embferry.serve.config import EncodeSettings, LanguageSettings, Settings
from embferry.traces.context import TraceContext, context_in
from embferry.traces.otlp import open_tracer

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0
"""Seconds that the thread gets to finish its current step when the worker ends."""


class Manager(Protocol):
    """The manager of a worker's transfers, as far as the worker needs it."""

    @property
    def fault(self) -> BaseException | None:
        """The bug that has stopped it for good."""
        ...

    def close(self) -> None: ...


M = TypeVar("M", bound=Manager)
Key = TypeVar("Key")
Open = TypeVar("Open")


class Service(ABC, Generic[M, Key, Open]):
    """Base of both workers. Any thread may call the public methods.

    Args:
        manager: closed with the service.
        settings: all of them.

    Attributes:
        metrics: the worker's.
        budget: bounds the bytes that open requests hold.
        fault: the bug that has stopped the service for good; None while it works.
        tracer: makes the spans of requests; None unless they are wanted.

    Raises:
        EmbferryError: they are wanted, and OpenTelemetry is not installed.
    """

    role: ClassVar[str]
    thread_name: ClassVar[str]
    metrics: Metrics

    def __init__(self, manager: M, settings: Settings) -> None:
        place = settings.place("traces", "endpoint")
        self.tracer = open_tracer(settings.traces.endpoint, f"embferry-{self.role}", setting=place)
        self.manager: M = manager
        self.budget = ByteBudget(self._max_held_bytes(settings), f"{self.role}.max_held_bytes")
        self.settings = settings
        self.fault: BaseException | None = None
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._open: dict[Key, Open] = {}  # requests that have begun and not ended
        self._refusing = self._stopping = False
        self._thread = threading.Thread(target=self._run, name=self.thread_name, daemon=True)

    @property
    def load(self) -> float:
        """Number of requests that have begun and not ended."""
        return len(self._open)

    @abstractmethod
    def abort_room(self, room: int) -> bool:
        """Ends the work for a room; returns false if there is none. Idempotent."""

    async def unready(self) -> str | None:
        """Returns why requests would fail now; None if they would not. Answers within seconds."""
        return None

    @classmethod
    def _max_held_bytes(cls, settings: Settings) -> int:
        section: EncodeSettings | LanguageSettings = getattr(settings, cls.role)
        return section.max_held_bytes or machine_memory_bytes() // 4

    def call_in(self, headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
        """Returns the span of the caller that the headers of a request name; None if no spans are wanted."""
        if self.tracer is None:
            return None
        context = context_in(headers)
        return context if context is not None and context.sampled else None

    def refuse(self) -> None:
        """Makes the service refuse every new request with status 503."""
        self._refusing = True

    def wait_idle(self, seconds: float) -> bool:
        """Waits until no request is left; returns false if that takes longer than ``seconds``."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._open or self.fault is not None, seconds)

    def close(self) -> None:
        """Ends the remaining requests with an error, the thread and the transfers. Idempotent."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake.set()
        self._thread.join(JOIN_SECONDS)
        self.manager.close()
        if self.tracer is not None:
            self.tracer.close()

    def _check_capacity(self, limit: int, setting: str, room: int | None) -> None:
        """Raises CapacityError if no request may begin. Called with the lock held."""
        if self._refusing or self._stopping:
            raise CapacityError(f"this {self.role} worker is shutting down; ask another", room=room)
        if len(self._open) >= limit:
            why = f"this {self.role} worker has {len(self._open)} open requests ({setting}); try again later"
            raise CapacityError(why, room=room)

    # Called on the service's thread

    def _run(self) -> None:
        torch.set_num_threads(self.settings.threads)  # OpenMP keeps this setting per thread
        try:
            while not self._stopping:
                if (fault := self.manager.fault) is not None:
                    raise fault  # no transport works any more: only a new process can help
                self._wake.clear()
                if not self._step() and not self._stopping:
                    self._wake.wait(self._wait_seconds())
        except Exception as error:
            log.critical("the thread %s has stopped; please report this bug", self.thread_name, exc_info=error)
            with self._idle:
                self.fault = error
                self._idle.notify_all()

    @abstractmethod
    def _step(self) -> bool:
        """Does some work; returns false if there is none."""

    def _wait_seconds(self) -> float | None:
        """Returns after how many seconds there may be work although nothing has happened; None for never."""
        return None
