"""A process with one end of one candidate; obeys the coordinator over a pipe, and ends with it.

A request is ``(name, arguments)``, an answer ``("done", facts)``, ``("unavailable", why)`` or ``("failed", why)``.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..processes import end_with_parent
from . import meters, payloads
from .contract import Facts, Job, Link, UnavailableError


def main(control_fd: int, link_fd: int, parent: int) -> None:
    """Obeys the coordinator until it says ``close`` or ends."""
    end_with_parent(parent, signal.SIGKILL)
    faulthandler.enable()
    control: Connection[Any, Any] = Connection(control_fd)
    with control, socket.socket(fileno=link_fd) as link:
        _Worker(control, link).serve()
    # Engines leave threads that cannot be ended.
    sys.stderr.flush()
    os._exit(0)


class _Worker:
    def __init__(self, control: Connection[Any, Any], link: socket.socket) -> None:
        self._control, self._link = control, link
        self._end: Any

    def serve(self) -> None:
        commands: dict[str, Callable[..., Facts]] = {
            name: getattr(self, name)
            for name in ("make", "connect", "stage", "arm", "go", "digests", "finish", "close")
        }
        name = ""
        while name != "close":
            try:
                name, arguments = self._control.recv()
            except (EOFError, ConnectionError):
                return
            try:
                self._control.send(("done", commands[name](**arguments)))
            except UnavailableError as error:
                self._control.send(("unavailable", str(error)))
            except Exception as error:
                # Any failure is the candidate's: the coordinator reports it and goes on with the others.
                traceback.print_exc()
                self._control.send(("failed", f"{type(error).__name__}: {error}"))
                raise

    def make(self, role: str, job: Job) -> Facts:
        """Makes the end. Memory counts from here on."""
        module, _, prefix = job.factory.partition(":")
        self._job, link = job, Link(self._link, job.timeout_s)
        classes = importlib.import_module(module)
        meters.reset_peak()
        self._before = meters.memory("VmRSS")
        if role == "sending":
            self._end = getattr(classes, f"{prefix}Sending")(job, payloads.make(job.size), link)
        else:
            self._end = getattr(classes, f"{prefix}Receiving")(job, link)
        return {"address": self._end.address(), "pool_bytes": getattr(self._end, "pool_bytes", 0)}

    def connect(self, other: Facts) -> Facts:
        self._end.connect(other)
        return {}

    def stage(self, number: int) -> Facts:
        self._used = -meters.cpu_seconds()
        payloads.stamp(self._end.source, number)
        staged: Facts = self._end.stage(number)
        return staged

    def arm(self, number: int, staged: Facts) -> Facts:
        """Sends a first answer when the end is ready to receive; the second follows when it has received."""
        self._used = -meters.cpu_seconds()
        self._end.arm(number, staged)
        self._control.send(("done", {}))
        self._end.receive()
        return {"at": time.monotonic_ns()}

    def go(self) -> Facts:
        """Starts the clock. CLOCK_MONOTONIC is the same in all processes of a host."""
        began = time.monotonic_ns()
        self._end.send()
        return {"at": began}

    def digests(self) -> Facts:
        """Returns the digest of every embedding that was sent or that arrived."""
        self._used += meters.cpu_seconds()
        digests = [payloads.digest(arrays) for arrays in self._end.each()]
        self._used -= meters.cpu_seconds()
        return {"digests": sorted(digests)}

    def finish(self) -> Facts:
        """Ends the round, and returns what this end used in it, without the digests."""
        details = self._end.finish()
        beyond = meters.memory("VmHWM") - self._before - self._job.size - getattr(self._end, "counted_twice", 0)
        return {"cpu": self._used + meters.cpu_seconds(), "memory": beyond, "details": details}

    def close(self) -> Facts:
        self._end.close()
        return {}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
