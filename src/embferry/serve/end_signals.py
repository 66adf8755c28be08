"""Signals that end a process, none of which is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from types import FrameType, TracebackType
from typing import Self


class EndSignals:
    """Waits for a signal in the main thread, in which Python runs the handlers. A context manager, used once.

    Python runs a handler between two steps of the main thread. If a signal comes between the last step and a
    blocking call, or if the kernel gives it to another thread, its handler runs only when that call returns. A wait for
    a lock or an event would then never return. So Python writes a byte into a pipe where the signal comes
    (``signal.set_wakeup_fd``), and :meth:`wait` reads from it.

    Args:
        numbers: the signals. Others keep their handlers; one in Python ends the wait by what it raises.
        handle: called for each of them, in the main thread, wherever that may be.
    """

    def __init__(
        self, numbers: Collection[int] = (signal.SIGINT, signal.SIGTERM), handle: Callable[[], None] = lambda: None
    ) -> None:
        self._numbers, self._handle = numbers, handle
        self._has_come = False

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in self._numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._read)
        os.close(self._write)

    def wait(self) -> None:
        """Returns when the first signal has come and was handled."""
        while not self._has_come:
            os.read(self._read, 1)
            time.sleep(0)  # its handler runs now, before the flag is read

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._has_come = True
        self._handle()
