"""Faults: exceptions that foreign code raises, and a call that takes long."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SLOW_SECONDS = 0.2


@dataclass(frozen=True)
class Fault:
    """A thing that goes wrong.

    Attributes:
        error: Makes the exception that is raised, or None: the call takes long.
        text: What the error of the transfer must say.
    """

    name: str
    error: Callable[[], BaseException] | None = None
    text: str = ""


class UnreadableError(Exception):
    """An exception that cannot be shown, such as one whose __init__ was never called."""

    def __repr__(self) -> str:
        raise AttributeError("no such attribute")

    __str__ = __repr__


def _ctrl_c() -> BaseException:
    """Returns a KeyboardInterrupt, but not for the main thread, where it would end the tests."""
    kind = RuntimeError if threading.current_thread() is threading.main_thread() else KeyboardInterrupt
    return kind("Ctrl-C was planted")


def _of_the_system(number: int) -> Fault:
    return Fault(errno.errorcode[number], lambda: OSError(number, os.strerror(number)), os.strerror(number))


FAULTS = (
    Fault("RuntimeError", lambda: RuntimeError("this was planted"), "this was planted"),
    Fault("MemoryError", lambda: MemoryError("no room was planted"), "no room was planted"),
    _of_the_system(errno.EMFILE),
    _of_the_system(errno.ENOMEM),
    Fault("closed loop", lambda: RuntimeError("Event loop is closed"), "Event loop is closed"),
    Fault("CancelledError", lambda: asyncio.CancelledError("a task was cancelled"), "a task was cancelled"),
    Fault("KeyboardInterrupt", _ctrl_c, "Ctrl-C was planted"),
    Fault("no repr", UnreadableError, "UnreadableError"),
    Fault("slow"),
)


class Trip:
    """Strikes once, at its first call.

    Attributes:
        fired: Set by that call.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.fired = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, *_: object) -> None:
        with self._lock:
            if self.fired.is_set():
                return
            self.fired.set()
        if self.fault.error is None:
            time.sleep(SLOW_SECONDS)
        else:
            raise self.fault.error()

    def before(self, call: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        """Returns ``call`` with the fault before it."""

        def tripping(*arguments: Any, **keywords: Any) -> Any:
            if when(*arguments):
                self()
            return call(*arguments, **keywords)

        return tripping

    def after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``call`` with the fault after it."""

        def tripping(*arguments: Any, **keywords: Any) -> Any:
            result = call(*arguments, **keywords)
            self()
            return result

        return tripping

    def plant(self, owner: Any, name: str) -> None:
        """Puts the fault before a method of one object."""
        setattr(owner, name, self.before(getattr(owner, name)))

    def plant_in_property(self, owner: Any, name: str) -> None:
        """Puts the fault before a property of one object."""
        cls = type(owner)
        found = next(base.__dict__[name] for base in cls.__mro__ if name in base.__dict__)
        tripping = property(self.before(found.fget))
        owner.__class__ = type(cls.__name__, (cls,), {name: tripping})
