"""The two processes of a candidate as the coordinator sees them, and one round between them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from ..processes import Child
from .contract import Facts, Job, UnavailableError
from .results import Sample

LAST_LINES = 8
CLOSE_S = 10.0
KILL_S = 0.5
"""How long a failed process may take to end by itself."""
OTHER_S = 0.3
"""How long to wait for the failure of one end when the other has failed."""


class CandidateError(Exception):
    """A process failed, crashed or was too slow; the text ends with the last lines of its output."""


class _Worker:
    """A process with one end. Making it asks it to make that end."""

    def __init__(self, role: str, job: Job, link: socket.socket) -> None:
        self._name, self._timeout_s = {"Sending": "sender", "Receiving": "receiver"}[role], job.timeout_s
        self._control, theirs = Pipe()
        with theirs, link:
            files = (theirs.fileno(), link.fileno())
            command = [sys.executable, "-m", f"{__package__}.worker", *map(str, files)]
            log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
            self.child = Child(command, log, signal.SIGKILL, pass_fds=files)
        self.ask("make", job=job, role=role)

    def ask(self, name: str, **arguments: Any) -> None:
        """Sends a request; :meth:`answer` returns what comes back."""
        try:
            self._control.send((name, arguments))
        except OSError:
            raise CandidateError(self._how_it_ended(name)) from None

    def answer(self, what: str) -> Facts:
        """Waits for the next answer.

        Raises:
            CandidateError: the process failed, ended, or did not answer in time.
            UnavailableError: the candidate cannot run here.
        """
        if not self._control.poll(self._timeout_s):
            why = f"{self._name}: no answer to {what!r} within {self._timeout_s:g} s{self._last_lines()}"
            raise CandidateError(why)
        try:
            outcome, facts = self._control.recv()
        except (EOFError, OSError):
            raise CandidateError(self._how_it_ended(what)) from None
        if outcome == "unavailable":
            raise UnavailableError(facts)
        if outcome == "failed":
            raise CandidateError(f"{self._name}, in {what!r}: {facts}")
        found: Facts = facts
        return found

    def call(self, name: str, **arguments: Any) -> Facts:
        self.ask(name, **arguments)
        return self.answer(name)

    def failure(self) -> str:
        """Returns why this process has failed, too; empty if it has not, or has said so already."""
        with suppress(OSError):
            while self._control.poll(OTHER_S):
                try:
                    self.answer("this round")
                except (CandidateError, UnavailableError) as error:
                    return str(error)
        return ""

    def close(self) -> None:
        self.child.process.send_signal(signal.SIGCONT)
        with suppress(CandidateError):
            self.ask("close")

    def end(self, within_s: float) -> None:
        self._control.close()
        self.child.end(within_s)

    def _how_it_ended(self, what: str) -> str:
        try:
            status = self.child.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return f"{self._name}: closed its connection in {what!r}{self._last_lines()}"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self._name}: {how} in {what!r}{self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self.child.lines()[-LAST_LINES:]
        return "; its last lines: " + " | ".join(lines) if lines else ""


class Pair:
    """Sender and receiver of a candidate. They start while others do; :meth:`connect` waits for them."""

    def __init__(self, job: Job) -> None:
        ours, theirs = socket.socketpair()
        self._receiver, self._sender = _Worker("Receiving", job, ours), _Worker("Sending", job, theirs)
        self._both = (self._receiver, self._sender)

    def connect(self) -> None:
        receiver, sender = self._receiver.answer("make"), self._sender.answer("make")
        self._sender.call("connect", other=receiver)
        self._receiver.call("connect", other=sender)

    def run(self, number: int) -> Sample:
        """Runs one round, and compares digests of all bytes after the clock has stopped.

        Raises:
            CandidateError: an end failed, or the bytes differ.
        """
        try:
            return self._run(number)
        except CandidateError as error:
            # One end often fails because the other has: report both.
            said = [str(error), *(worker.failure() for worker in self._both)]
            raise CandidateError("; ".join(dict.fromkeys(filter(None, said)))) from None

    def _run(self, number: int) -> Sample:
        staged = self._sender.call("stage", number=number)
        self._receiver.call("arm", number=number, staged=staged)
        self._sender.ask("go")
        ready = self._receiver.answer("receive")["at"]
        went = self._sender.answer("go")["at"]
        received, sent = self._receiver.call("finish"), self._sender.call("finish")
        if received["digests"] != sent["digests"]:
            digests = f"{received['digests']}, not {sent['digests']}"
            raise CandidateError(f"the bytes that arrived are not those that were sent: {digests}")
        ends: list[int] = received.get("ends", [])
        starts: list[int] = sent.get("starts", [went] * len(ends))
        return Sample(
            seconds=received.get("seconds", (ready - went) / 1e9),
            sender_cpu=sent["cpu"],
            receiver_cpu=received["cpu"],
            memory_beyond=received["memory"],
            transfers=received.get("transfers"),
            waits=[(at - start) / 1e9 for start, at in zip(starts, ends, strict=False)],
        )

    def signal(self, number: signal.Signals) -> None:
        """Stops (SIGSTOP) or resumes (SIGCONT) all threads of both, so that an engine that polls disturbs no other."""
        for worker in self._both:
            worker.child.process.send_signal(number)

    def close(self) -> None:
        """Asks both to end; :meth:`end` waits for it."""
        for worker in self._both:
            worker.close()

    def end(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        for worker in self._both:
            worker.end(max(0.0, deadline - time.monotonic()))
