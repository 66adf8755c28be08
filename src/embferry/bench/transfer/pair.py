"""The two processes of a candidate as the coordinator sees them, and one round between them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

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

    def __init__(self, role: str, why: str) -> None:
        super().__init__(why)
        self.role = role


class _Child:
    """A worker process, whose standard output and error go to an unnamed file."""

    def __init__(self, role: str, job: Job, link: socket.socket) -> None:
        self.role, self._timeout_s = role, job.timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
        self._control, theirs = Pipe()
        with theirs, link:
            descriptors = (theirs.fileno(), link.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", *map(str, (*descriptors, os.getpid()))],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                process_group=0,  # Ctrl-C reaches only the coordinator, which ends its children in order
            )

    def ask(self, name: str, **arguments: Any) -> None:
        """Sends a request; :meth:`answer` returns what comes back."""
        try:
            self._control.send((name, arguments))
        except OSError:
            raise CandidateError(self.role, self._how_it_ended(name)) from None

    def answer(self, what: str) -> Facts:
        """Waits for the next answer.

        Raises:
            CandidateError: the process failed, ended, or did not answer in time.
            UnavailableError: the candidate cannot run here.
        """
        if not self._control.poll(self._timeout_s):
            why = f"{self.role}: no answer to {what!r} within {self._timeout_s:g} s{self._last_lines()}"
            raise CandidateError(self.role, why)
        try:
            outcome, facts = self._control.recv()
        except (EOFError, OSError):
            raise CandidateError(self.role, self._how_it_ended(what)) from None
        if outcome == "unavailable":
            raise UnavailableError(facts)
        if outcome == "failed":
            raise CandidateError(self.role, f"{self.role}, in {what!r}: {facts}")
        found: Facts = facts
        return found

    def call(self, name: str, **arguments: Any) -> Facts:
        self.ask(name, **arguments)
        return self.answer(name)

    def failure(self) -> str | None:
        """Returns why this process has failed, if it has."""
        with suppress(OSError):
            while self._control.poll(OTHER_S):
                try:
                    self.answer("this round")
                except (CandidateError, UnavailableError) as error:
                    return str(error)
        return None

    def ask_to_close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        with suppress(CandidateError):
            self.ask("close")

    def end(self, within_s: float) -> None:
        """Waits until the process has ended; kills it when that takes too long."""
        self._control.close()
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        finally:
            self._log.close()

    def _how_it_ended(self, what: str) -> str:
        try:
            status = self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return f"{self.role}: closed its connection in {what!r}{self._last_lines()}"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self.role}: {how} in {what!r}{self._last_lines()}"

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "; its last lines: " + " | ".join(lines) if lines else ""


class Pair:
    """Sender and receiver of a candidate. Starting has two steps, so that several pairs start at once."""

    def __init__(self, job: Job) -> None:
        self.job, self.pool_bytes = job, 0
        ours, theirs = socket.socketpair()
        self._receiver = _Child("receiver", job, ours)
        try:
            self._sender = _Child("sender", job, theirs)
        except BaseException:
            self._receiver.end(0.0)
            raise
        self._both = (self._sender, self._receiver)

    def begin(self) -> None:
        """Makes both ends; :meth:`connect` waits for them."""
        self._receiver.ask("make", role="receiving", job=self.job)
        self._sender.ask("make", role="sending", job=self.job)

    def connect(self) -> None:
        receiver, sender = self._receiver.answer("make"), self._sender.answer("make")
        self.pool_bytes = receiver["pool_bytes"]
        self._receiver.call("connect", other=sender["address"])
        self._sender.call("connect", other=receiver["address"])

    def run(self, number: int) -> Sample:
        """Runs one round, and compares digests of all bytes after the clock has stopped.

        Raises:
            CandidateError: an end failed, or the bytes differ.
        """
        try:
            return self._run(number)
        except CandidateError as error:
            # One end often fails because the other has: report both.
            others = [child.failure() for child in self._both if child.role != error.role]
            raise CandidateError(error.role, "; ".join([str(error), *filter(None, others)])) from None

    def _run(self, number: int) -> Sample:
        staged = self._sender.call("stage", number=number)
        self._receiver.call("arm", number=number, staged=staged)
        self._sender.ask("go")
        ready = self._receiver.answer("receive")
        went = self._sender.answer("go")
        sent, arrived = self._sender.call("digests"), self._receiver.call("digests")
        if arrived != sent:
            why = f"the bytes that arrived are not those that were sent: {arrived}, not {sent}"
            raise CandidateError("both", why)
        received, sent = self._receiver.call("finish"), self._sender.call("finish")
        details = received["details"]
        return Sample(
            seconds=details.pop("seconds", (ready["at"] - went["at"]) / 1e9),
            sender_cpu=sent["cpu"],
            receiver_cpu=received["cpu"],
            memory_beyond=received["memory"],
            transfers=details.get("transfers"),
            waits=[(at - went["at"]) / 1e9 for at in details.get("ready", ())],
        )

    def park(self) -> None:
        """Stops all threads of both processes, so that an engine that polls does not disturb the others' turns."""
        for child in self._both:
            child.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for child in self._both:
            child.process.send_signal(signal.SIGCONT)

    def ask_to_close(self) -> None:
        """Asks both to end; :meth:`end` waits for it."""
        for child in self._both:
            child.ask_to_close()

    def end(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        for child in self._both:
            child.end(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        self.ask_to_close()
        self.end(KILL_S)
