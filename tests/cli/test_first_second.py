"""The command before it does anything: Ctrl-C while modules are imported, the version, shell completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from embferry import __version__
from tests.serve.test_cli import called

INTERRUPTED = """
import os, signal, sys
from embferry.cli import entry

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = ["embferry", *{words!r}]
entry.run()
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("embferry.cli.main", ["--version"]),
        ("typer", ["ask", "what?"]),
        ("pydantic", ["serve"]),
        ("httpx", ["ask", "what?", "--url", "http://127.0.0.1:9"]),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_quiet(module: str, words: list[str]) -> None:
    script = INTERRUPTED.format(module=module, words=words)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode in (-signal.SIGINT, 130)


def test_the_version() -> None:
    assert called("--version") == (0, f"embferry {__version__}\n", "")


def test_bash_completes_verbs_and_options() -> None:
    environ = {**os.environ, "_EMBFERRY_COMPLETE": "complete_bash"}

    def completed(line: str) -> list[str]:
        words = {**environ, "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv[0] = 'embferry'; from embferry.cli.entry import run; run()"],
            env=words, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("embferry a") == ["ask"]
    assert "--bootstrap-port" in completed("embferry serve --bootstrap-p")


def test_completion_can_be_installed() -> None:
    help_text = called("--help")[1]
    assert "--install-completion" in help_text
    assert "--show-completion" in help_text
