"""The commands of ``docs/tutorial.md``, typed one after the other, print what the page says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
INSTALLED = ("make setup", "source .venv/bin/activate")
"""Commands that have been run: by what has installed the environment of this test, and in its place by ``PATH``."""
SECONDS = 120
READY = "ready: shapes at "
LOGGED = (READY, "needs resume", "Sent resume", "completed with")
"""How lines of the page begin that the server writes, in the first terminal."""


def steps() -> list[tuple[str, list[str]]]:
    """Returns the commands of the page, each with the lines that the page shows for it."""
    found: list[tuple[str, list[str]]] = []
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        if language == "console":
            found += [(command, []) for command in code.splitlines()]
        else:
            assert language == "text"
            found[-1][1].extend(code.splitlines())
    return found


def without_numbers(text: str) -> str:
    """Returns a text without what differs from run to run: numbers of transfers, rooms, ports, times."""
    return re.sub(r"\d[\d,.]*", "N", text)


class Terminals:
    """Two terminals: one serves, the other asks. Commands use ports of their own in place of the usual ones."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.port, self.bootstrap = free_port(), free_port()
        folder = str(Path(sys.executable).parent)
        self.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    @contextmanager
    def serve(self, command: str) -> Iterator[None]:
        """Runs a server until it is ready, then during the context. Ends it by Ctrl-C, as the page says."""
        words = [*shlex.split(command), "--port", str(self.port), "--bootstrap-port", str(self.bootstrap)]
        with self.log.open("w") as log:
            process = subprocess.Popen(
                words, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    log.write(line)
                    if READY in line:
                        break
                else:
                    pytest.fail(f"{command} ended: {self.log.read_text()}")
                yield
            finally:
                process.send_signal(signal.SIGINT)
                for line in process.stderr:
                    log.write(line)
                process.wait(SECONDS)
                process.stderr.close()
        assert process.returncode == 0, self.log.read_text()

    def run(self, command: str) -> str:
        """Runs a command to its end and returns all that it has written."""
        words = shlex.split(command)
        if words[:2] in (["embferry", "ask"], ["embferry", "status"]):
            words[2:2] = ["--url", f"http://127.0.0.1:{self.port}"]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def test_the_page_has_the_commands_that_are_expected() -> None:
    commands = [command for command, _ in steps()]
    assert tuple(commands[: len(INSTALLED)]) == INSTALLED
    assert sum(command.startswith("embferry serve") for command in commands) == 2
    assert {command.split()[0] for command in commands[len(INSTALLED) :]} == {"embferry", "python"}


@pytest.mark.integration
@pytest.mark.sweeps
def test_every_command_prints_what_the_page_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    terminals = Terminals(log)
    of_servers = [line for _, lines in steps() for line in lines if line.startswith(LOGGED)]
    with ExitStack() as stack:
        for command, lines in steps()[len(INSTALLED) :]:
            if command.startswith("embferry serve"):
                stack.close()
                stack.enter_context(terminals.serve(command))
                continue
            written = terminals.run(command)
            for line in lines:
                if line not in of_servers:
                    assert without_numbers(line) in without_numbers(written), command
            if found := re.search(r"(\d+) resumed transfers over", written):
                assert (int(found[1]) > 0) == ("star-flies" in command)
    assert len(of_servers) == 4
    for line in of_servers:
        assert without_numbers(line) in without_numbers(log.read_text())
