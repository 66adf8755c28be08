"""The pipes between a supervisor and its child.

The child's standard input brings one line, such as its settings, where no ``ps`` shows them. It then stays open until
the supervisor ends, and brings the seconds that the child has to end, just before the signal. The kernel closes it even
when the supervisor is killed. (``PR_SET_PDEATHSIG`` does not do that: it goes by the thread that started the child, not
by the process.) The child's standard output carries one line: its URL as soon as it accepts requests, or the reason why
it cannot start.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable

from embferry.serve.config import Settings
from embferry.serve.supervisor.process import ProcessRole, Program

MAX_LINE_BYTES = 1 << 20


def pack(settings: Settings) -> bytes:
    """Returns the settings and their places as a line, with the API key in clear text, which their JSON leaves out."""
    fields = settings.model_dump(mode="json")
    if settings.router.api_key is not None:
        fields["router"]["api_key"] = settings.router.api_key.get_secret_value()
    return json.dumps({"settings": fields, "places": settings.places}).encode() + b"\n"


def unpack(line: bytes) -> Settings:
    """Returns the settings in a line."""
    told = json.loads(line)
    return Settings.model_validate(told["settings"]).with_places(told["places"])


def child_program(role: ProcessRole, name: str, settings: Settings) -> Program:
    """Returns a process of this project with all its settings: :mod:`.child`. ``name``: in its log lines."""
    return Program(("-m", "embferry.serve.supervisor.child", role, name), pack(settings))


def read_line(fd: int) -> bytes:
    """Reads one line, and nothing behind it. Raises EOFError if the input ends before."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(fd, 1 << 16)
        if not data or len(line) > MAX_LINE_BYTES:
            raise EOFError("the supervisor ended before it sent a line")
        line += data
    return bytes(line)


class SupervisorPipes:
    """The child's ends of the pipes. From here on, standard output goes to standard error.

    Attributes:
        reported: the child has told that it accepts requests.
        seconds: the time that the supervisor gives this process to end, once it has told it.
    """

    def __init__(self) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        self.reported = False
        self.seconds: float | None = None
        os.dup2(2, 1)

    def first_line(self) -> bytes:
        """Returns the supervisor's line. Ends the process with status 1 if the supervisor has ended."""
        try:
            return read_line(self._input)
        except EOFError:
            sys.exit(1)

    def report(self, url: str) -> None:
        """Tells the supervisor that this process accepts requests at ``url``."""
        self.reported = True
        self._tell({"url": url})

    def fail(self, reason: str) -> None:
        """Tells the supervisor why this process cannot start, instead of :meth:`report`."""
        self._tell({"failure": reason})

    def _tell(self, line: dict[str, str]) -> None:
        os.write(self._output, json.dumps(line).encode() + b"\n")

    def on_supervisor_end(self, action: Callable[[], None]) -> None:
        """Calls ``action`` in a thread of its own when the supervisor has ended. The thread also reads ``seconds``."""

        def wait() -> None:
            with contextlib.suppress(EOFError):
                while line := read_line(self._input):
                    self.seconds = float(line)
            action()

        threading.Thread(target=wait, name="supervisor-end", daemon=True).start()
