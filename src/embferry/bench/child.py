"""A worker process as the coordinator sees it: started, asked, stopped between its turns, ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

import msgspec

from .contract import Facts, Job, UnavailableError
from .worker import MAX_MESSAGE

LAST_LINES = 8
CLOSE_S = 10.0
OTHER_S = 0.3
"""How long to listen for the failure of one end when the other has failed."""


class ContestantError(Exception):
    """A contestant's process failed, crashed or was too slow; the text has the end of what it wrote to stderr."""

    def __init__(self, role: str, why: str) -> None:
        super().__init__(why)
        self.role = role


class Child:
    """One worker process. Its standard output and error go to an unnamed file, whose end is shown when it fails."""

    def __init__(self, role: str, job: Job, link: socket.socket) -> None:
        self.role, self._job = role, job
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, link:
            command = [sys.executable, "-m", f"{__package__}.worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(link.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), link.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                process_group=0,  # Ctrl-C is the coordinator's, which ends its children in order
            )

    def ask(self, do: str, **arguments: Any) -> None:
        """Sends a command; :meth:`answer` has what comes of it."""
        try:
            self._control.sendall(msgspec.json.encode({"do": do, **arguments}))
        except OSError:
            raise ContestantError(self.role, self._obituary(do)) from None

    def answer(self, what: str) -> Facts:
        """The next answer.

        :raises ContestantError: the process failed, ended, or did not answer within the job's time.
        :raises UnavailableError: the contestant says that it cannot run here."""
        if not select.select([self._control], [], [], self._job.timeout_s)[0]:
            why = f"{self.role}: no answer to {what!r} within {self._job.timeout_s:g} s{self._last_words()}"
            raise ContestantError(self.role, why)
        try:
            message = self._control.recv(MAX_MESSAGE)
        except ConnectionResetError:
            message = b""
        if not message:
            raise ContestantError(self.role, self._obituary(what))
        facts: Facts = msgspec.json.decode(message)
        if "unable" in facts:
            raise UnavailableError(facts["unable"])
        if "error" in facts:
            raise ContestantError(self.role, f"{self.role}, in {what!r}: {facts['error']}")
        return facts

    def call(self, do: str, **arguments: Any) -> Facts:
        """:meth:`ask` and :meth:`answer`."""
        self.ask(do, **arguments)
        return self.answer(do)

    def failure(self) -> str | None:
        """Why it has failed too, if it has: for when the other end has."""
        while select.select([self._control], [], [], OTHER_S)[0]:
            try:
                self.answer("this round")
            except (ContestantError, UnavailableError) as error:
                return str(error)
        return None

    def park(self) -> None:
        """Stops all its threads: who is not taking its turn costs the others nothing, whatever its engine does."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def ask_to_close(self) -> None:
        """Begins to end it in peace."""
        self.resume()
        with suppress(ContestantError):
            self.ask("close")

    def end(self, patience_s: float = CLOSE_S) -> None:
        """Waits for its end, and kills it when that takes too long. Idempotent."""
        self._control.close()  # it reads the end of the stream, if it did not read "close"
        deadline = time.monotonic() + patience_s
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _obituary(self, what: str) -> str:
        try:
            status = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return f"{self.role}: closed its connection in {what!r}{self._last_words()}"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self.role}: {how} in {what!r}{self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "; its last lines: " + " | ".join(lines) if lines else ""
