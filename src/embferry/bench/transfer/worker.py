"""A process with one end of one candidate; obeys the coordinator over a pipe, and ends with it.

A request is ``(name, arguments)``, an answer ``("done", facts)``, ``("unavailable", why)`` or ``("failed", why)``.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..machine import size
from . import payloads
from .contract import Facts, Job, Link, UnavailableError


def reset_peak() -> None:
    """Resets the peak of resident memory, ``VmHWM`` (proc(5)); a system that forbids it leaves the peak so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """Its methods are the requests. CPU time is that of all threads of the process."""

    def __init__(self, control: Connection[Any, Any], link: socket.socket) -> None:
        self._control, self._link = control, link
        self._end: Any

    def serve(self) -> None:
        """Obeys the coordinator until it says ``close`` or ends."""
        name = ""
        while name != "close":
            try:
                name, arguments = self._control.recv()
            except (EOFError, ConnectionError):
                return
            try:
                self._control.send(("done", getattr(self, name)(**arguments)))
            except UnavailableError as error:
                self._control.send(("unavailable", str(error)))
            except Exception as error:
                # Any failure is the candidate's: the coordinator reports it and goes on with the others.
                traceback.print_exc()
                self._control.send(("failed", f"{type(error).__name__}: {error}"))
                raise

    def make(self, job: Job, role: str) -> Facts:
        """Makes the end. Memory counts from here on."""
        module, _, prefix = job.factory.partition(":")
        end = getattr(importlib.import_module(module), f"{prefix}{role}")
        reset_peak()
        self._before = size("/proc/self/status", "VmRSS") + job.size
        tensor = (payloads.make if role == "Sending" else payloads.empty)(job.size)
        self._end = end(job, Link(self._link, job.timeout_s), tensor)
        address: Facts = self._end.address()
        return address

    def connect(self, other: Facts) -> Facts:
        self._end.connect(other)
        return {}

    def stage(self, number: int) -> Facts:
        self._used = -time.process_time()
        payloads.stamp(self._end.tensor, number)
        staged: Facts = self._end.stage(number)
        return staged

    def arm(self, number: int, staged: Facts) -> Facts:
        """Sends a first answer when the end is ready to receive; the second follows when it has received."""
        self._used = -time.process_time()
        self._end.arm(number, staged)
        self._control.send(("done", {}))
        self._end.receive()
        return {"at": time.monotonic_ns()}

    def go(self) -> Facts:
        """Starts the clock. CLOCK_MONOTONIC is the same in all processes of a host."""
        began = time.monotonic_ns()
        self._end.send()
        return {"at": began}

    def finish(self) -> Facts:
        """Ends the round; returns the digest of every embedding, and what this end used, without the digests."""
        self._used += time.process_time()
        digests = sorted(payloads.digest(arrays) for arrays in self._end.each())
        self._used -= time.process_time()
        facts: Facts = self._end.finish()
        beyond = size("/proc/self/status", "VmHWM") - self._before - self._end.counted_twice
        return facts | {"digests": digests, "cpu": self._used + time.process_time(), "memory": beyond}

    def close(self) -> Facts:
        self._end.closing.close()
        return {}


if __name__ == "__main__":
    faulthandler.enable()
    control: Connection[Any, Any] = Connection(int(sys.argv[1]))
    with control, socket.socket(fileno=int(sys.argv[2])) as link:
        Worker(control, link).serve()
    # Engines leave threads that cannot be ended.
    sys.stderr.flush()
    os._exit(0)
