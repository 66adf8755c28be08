"""The command before it does anything: Ctrl-C while modules are imported, the version, shell completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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

COMMAND = "import sys; sys.argv[0] = 'embferry'; from embferry.cli.entry import run; run()"


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
            [sys.executable, "-c", COMMAND],
            env=words, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("embferry a") == ["ask"]
    assert "--bootstrap-port" in completed("embferry serve --bootstrap-p")


def test_zsh_completes_verbs() -> None:
    environ = {**os.environ, "_EMBFERRY_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "embferry stat"}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith('_arguments \'*: :(("status":"Show whether')


@pytest.mark.parametrize(
    ("shell", "files", "start"),
    [
        ("bash", {".bashrc", ".bash_completions/embferry.sh"}, "_embferry_completion()"),
        ("zsh", {".zshrc", ".zfunc/_embferry"}, "#compdef embferry"),
    ],
)
def test_completion_is_installed_for_the_shell(tmp_path: Path, shell: str, files: set[str], start: str) -> None:
    install(tmp_path, shell)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == files
    assert any((tmp_path / name).read_text().lstrip().startswith(start) for name in files)


def test_bash_completes_with_what_was_installed(tmp_path: Path) -> None:
    install(tmp_path, "bash")
    command = tmp_path / "embferry"
    command.write_text(f"#!{sys.executable}\n{COMMAND}\n")
    command.chmod(0o755)
    script = "source ~/.bashrc; COMP_WORDS=(embferry stat); COMP_CWORD=1; "
    script += '_embferry_completion embferry; echo "${COMPREPLY[@]}"'
    environ = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("status\n", "")


def install(home: Path, shell: str) -> None:
    """Installs the completion for a shell, which typer would otherwise find by the process that runs the command."""
    environ = {**os.environ, "HOME": str(home), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [sys.executable, "-c", COMMAND, "--install-completion", shell]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{shell} completion installed" in done.stdout
