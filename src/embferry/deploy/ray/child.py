"""The process under a replica."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from embferry.deploy.ray.names import WorkerRole
from embferry.serve.supervisor.process import Program, SupervisedProcess


class ChildError(Exception):
    """The process cannot be started; the message says why."""


class Child:
    """A process that ends with this one. It is not started again when it ends: Ray replaces the whole replica.

    Args:
        name: for logs.
        role: of the worker.
        program: what it runs.
        on_end: called on a thread when the process has ended by itself after :meth:`start`.
    """

    def __init__(self, name: str, role: WorkerRole, program: Program, on_end: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._is_stopping = False
        self._on_end = on_end
        self._process = SupervisedProcess(
            name, role, lambda: program, os.environ, 0.0, None, self._notify, self._has_ended
        )

    def start(self, seconds: float, setting: str) -> str:
        """Starts the process. Returns the URL at which it accepts requests.

        Args:
            seconds: that it may take.
            setting: the name of the setting with these seconds.

        Raises:
            ChildError: it ends before that, or takes too long.
        """
        self._process.start()
        with self._changed:
            self._changed.wait_for(lambda: self._process.first_url or self._process.failure is not None, seconds)
        if self._process.failure is not None:
            raise ChildError(self._process.failure)
        if not self._process.first_url:
            self.stop(0.0)
            raise ChildError(f"{self._process.name} is not ready within {seconds:g} s ({setting})")
        return self._process.first_url

    def stop(self, seconds: float) -> None:
        """Ends the process in order; after ``seconds`` it is killed. Idempotent."""
        self._is_stopping = True
        self._process.stop(seconds)
        self._process.join(time.monotonic() + seconds)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_ended(self) -> None:
        if self._process.first_url and not self._is_stopping:
            self._process.stop()  # so that it is not started again
            self._on_end()
