"""One process with one end of one contestant in it. Told what to do over a socket; ends with whoever started it."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from . import content, meters
from .contract import Facts, Job, Link, Receiving, Sending, UnavailableError

MAX_MESSAGE = 1 << 20
PR_SET_PDEATHSIG = 1


def main(control_fd: int, link_fd: int, parent: int) -> None:
    """Serves the coordinator until it says so or is gone."""
    _die_with(parent)
    faulthandler.enable()
    with socket.socket(fileno=control_fd) as control, socket.socket(fileno=link_fd) as link:
        _Worker(control, link).serve()
    # Engines leave threads behind that nothing ends; everything of ours is closed.
    sys.stderr.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    """Has the kernel end this process when the coordinator ends, however that comes about."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(1)  # it ended before it was watched


class _Worker:
    """The commands are its methods without the underscore; each answers with facts."""

    def __init__(self, control: socket.socket, link: socket.socket) -> None:
        self._control, self._link = control, link
        self._end: Sending | Receiving
        self._number = 0
        self._moved = 0

    def serve(self) -> None:
        commands: dict[str, Callable[..., Facts]] = {
            name: getattr(self, name)
            for name in ("make", "connect", "stage", "arm", "go", "finish", "digests", "close")
        }
        while message := self._control.recv(MAX_MESSAGE):
            request: dict[str, Any] = msgspec.json.decode(message)
            name = request.pop("do")
            try:
                self._answer(commands[name](**request))
            except UnavailableError as error:
                self._answer({"unable": str(error)})
            except Exception as error:
                # Whatever it is, it is this contestant's failure: told to the coordinator, which goes on with others.
                traceback.print_exc()
                self._answer({"error": f"{type(error).__name__}: {error}"})
                raise
            if name == "close":
                return

    def _answer(self, facts: Facts) -> None:
        self._control.sendall(msgspec.json.encode(facts))

    def make(self, role: str, job: Facts) -> Facts:
        """Makes the end. The memory it takes from here on counts."""
        wanted = msgspec.convert(job, Job)
        module, _, prefix = wanted.factory.partition(":")
        self._job, link = wanted, Link(self._link, wanted.timeout_s)
        classes = importlib.import_module(module)
        self._memory_method = meters.reset_peak()
        self._before = meters.memory("VmRSS")
        if role == "sending":
            self._end = getattr(classes, f"{prefix}Sending")(wanted, content.make(wanted.size), link)
        else:
            self._end = getattr(classes, f"{prefix}Receiving")(wanted, link)
        self._sent = meters.SentBytes()
        return {"address": self._end.address(), "pool_bytes": getattr(self._end, "pool_bytes", 0)}

    def connect(self, other: Facts) -> Facts:
        self._end.connect(other)
        return {}

    def stage(self, number: int) -> Facts:
        """The sending end's part of a round before the clock starts."""
        assert isinstance(self._end, Sending)
        self._begin(number)
        self._moved = self._end.moved
        content.stamp(self._end.source, number)
        return self._end.stage(number)

    def arm(self, number: int, staged: Facts) -> Facts:
        """The receiving end's part: answers when it is ready to receive, then again when it has received."""
        assert isinstance(self._end, Receiving)
        self._begin(number)
        self._end.arm(number, staged)
        self._answer({})
        self._end.receive()
        return {"at": time.monotonic_ns()}

    def go(self) -> Facts:
        """The clock starts. CLOCK_MONOTONIC is the same in all processes of a host."""
        assert isinstance(self._end, Sending)
        began = time.monotonic_ns()
        self._end.send()
        return {"at": began, "returned": time.monotonic_ns()}

    def finish(self) -> Facts:
        """Ends the round; what this end used in it."""
        stamped = not isinstance(self._end, Receiving) or content.is_stamped(self._end.arrays(), self._number)
        details = self._end.finish()
        if not stamped:
            raise ValueError(f"round {self._number}: the bytes are not those that were sent")
        used = {"cpu": meters.cpu_seconds() - self._cpu, "tcp": self._sent.delta(), "details": details}
        if isinstance(self._end, Sending):
            return used | {"moved": self._end.moved - self._moved}
        beyond = meters.memory("VmHWM") - self._before - self._job.size - self._end.counted_twice
        return used | {"memory": beyond, "memory_method": self._memory_method}

    def digests(self) -> Facts:
        """Of what was sent, or of everything that came. Between the clock's stop and ``finish``."""
        if isinstance(self._end, Sending):
            return {"digests": [content.digest([self._end.source])]}
        return {"digests": [content.digest(arrays) for arrays in self._end.each()]}

    def close(self) -> Facts:
        self._end.close()
        return {"threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]}

    def _begin(self, number: int) -> None:
        self._number = number
        self._sent.delta()
        self._cpu = meters.cpu_seconds()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
