"""``embferry top`` in a terminal: it starts, shows the router, ends, and leaves the terminal as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from tests.serve.fakes import DEADLINE, Deployment, closed_port
from tests.serve.test_cli import called

pytestmark = pytest.mark.integration

LEAVES_SCREEN, SHOWS_CURSOR, NO_MOUSE = "\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l"
_SEQUENCE = re.compile(r"\x1b(\[[0-9;?<>=]*[A-Za-z~]|\][^\x07]*\x07|.)")


class Terminal:
    """A terminal with a program in it.

    Attributes:
        written: everything that the program has written.
    """

    def __init__(self, words: list[str], width: int, height: int) -> None:
        self._own, self._its = pty.openpty()
        fcntl.ioctl(self._its, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._before = termios.tcgetattr(self._its)
        environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embferry", "top", *words],
            stdin=self._its, stdout=self._its, stderr=self._its, env=environ | {"TERM": "xterm-256color"},
            start_new_session=True,
        )  # fmt: skip
        self.written = ""
        self._is_over = threading.Event()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        data = b""
        while not self._is_over.is_set():
            if select.select([self._own], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    data += os.read(self._own, 1 << 16)
                self.written = data.decode(errors="replace")

    @property
    def text(self) -> str:
        """The written text, without sequences of control characters."""
        return _SEQUENCE.sub("", self.written)

    def shows(self, words: str) -> None:
        """Waits until something is shown."""
        for _ in range(int(DEADLINE / 0.02)):
            if words in self.text:
                return
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"{words} is not in: {self.text}")

    def type(self, keys: bytes) -> None:
        """Presses keys."""
        os.write(self._own, keys)

    def ends(self) -> int:
        """Waits for the end. Returns the exit status; checks that the terminal is as it was before."""
        status = self.process.wait(DEADLINE)
        assert termios.tcgetattr(self._its) == self._before
        missing = [LEAVES_SCREEN, SHOWS_CURSOR, NO_MOUSE]
        for _ in range(int(DEADLINE / 0.02)):  # the end is read a moment later, in parts
            missing = [sequence for sequence in missing if self.written.rfind(sequence) <= 0]
            if not missing:
                break
            time.sleep(0.02)
        assert not missing
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._is_over.set()
        self._reading.join()
        os.close(self._own)
        os.close(self._its)


@contextlib.contextmanager
def terminal(*words: str, width: int = 100, height: int = 30) -> Iterator[Terminal]:
    running = Terminal(list(words), width, height)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_shows_the_router_and_leaves_the_terminal_as_it_was(deployment: Deployment, end: bytes | int) -> None:
    deployment.wait(lambda: deployment.get("/ready").status_code == 200)
    with terminal("--url", deployment.url) as one:
        one.shows(deployment.url)
        one.shows("language 0")
        if isinstance(end, bytes):
            one.type(end)
        else:
            one.process.send_signal(end)
        assert one.ends() == 0
        assert "Traceback" not in one.text


def test_without_a_router_it_waits_for_one() -> None:
    with closed_port() as url, terminal("--url", url, width=60, height=24) as one:
        one.shows("no server responds at")
        one.type(b"q")
        assert one.ends() == 0
        assert "Traceback" not in one.text


def test_elsewhere_it_names_the_command_for_scripts() -> None:
    command = [sys.executable, "-m", "embferry", "top"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "embferry: embferry top needs a terminal, for its input, output and errors; elsewhere use: embferry status\n"
    )


def test_on_a_terminal_that_cannot_be_drawn_on() -> None:
    script = "import os; os.environ['TERM'] = 'dumb'; from embferry.cli.entry import run; run()"
    reader, writer = pty.openpty()
    try:
        command = [sys.executable, "-c", script, "top"]
        done = subprocess.run(command, stdin=writer, stdout=writer, stderr=writer, check=False)
        assert (done.returncode, b"use: embferry status" in os.read(reader, 4096)) == (2, True)
    finally:
        os.close(reader)
        os.close(writer)


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.cli.options.importlib.util.find_spec", lambda name: None)
    status, out, err = called("top")
    assert (status, out) == (2, "")
    assert err == "embferry: textual is not installed; install it with: pip install 'embferry[top]'\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--url", "ftp://h"), "ftp:// is not spoken here"),
        (("--api-key", "x"), "every user of this machine can read a command line"),
        (("--ca", "/nowhere/ca.pem"), "/nowhere/ca.pem"),
    ],
)
def test_wrong_options(words: tuple[str, ...], why: str) -> None:
    status, out, err = called("top", *words)
    assert (status, out, why in err) == (2, "", True)
