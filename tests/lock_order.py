"""A check of the order of two locks: a sink's lock is taken before its manager's, never after it.

Two threads that take them in different orders wait for each other for ever, but only at a bad moment. This finds each
wrong order in any run.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from embferry.transfer.receive_handle import EmbeddingReceiver
from embferry.transfer.receive_manager import ReceiveManager


class OrderedLock:
    """A sink's lock that notes where it is asked for by a thread that holds its manager's lock."""

    def __init__(self, manager_lock: Any, wrong: list[str]) -> None:
        self._lock: Any = threading.RLock()
        self._manager_lock, self._wrong = manager_lock, wrong

    def __enter__(self) -> None:
        if self._manager_lock._is_owned() and not self._lock._is_owned():
            self._wrong.append("".join(traceback.format_stack()[-4:-1]))
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextmanager
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks the order in every transfer that is opened within the block."""
    wrong: list[str] = []
    real = ReceiveManager.open

    def opened(manager: ReceiveManager, *arguments: Any, **keywords: Any) -> EmbeddingReceiver:
        receiver = real(manager, *arguments, **keywords)
        receiver._record.sink_lock = OrderedLock(manager.lock, wrong)  # type: ignore[assignment]
        return receiver

    monkeypatch.setattr(ReceiveManager, "open", opened)
    yield
    assert not wrong, "the lock of a sink was taken after its manager's:\n" + "\n".join(wrong)
