"""Output to a full disk, a closed pipe or a closed descriptor: one line says so, and there is no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.servers import router

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from embferry.cli.entry import run; run()"]
DEMO = [sys.executable, str(ROOT / "examples" / "demo.py")]
WRITING = [("version",), ("--help",), ("serve", "--help"), ("keys", "new")]
FULL, CLOSED = "No space left on device", "Bad file descriptor"


def onto_full_disk(command: list[str]) -> subprocess.CompletedProcess[str]:
    with open("/dev/full", "w") as full:
        return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)


def into_closed_pipe(command: list[str]) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        return subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)


def without(*descriptors: int) -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """Returns what runs a command as a shell does with ``>&-`` and the like."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        closed = " ".join(f"{descriptor}>&-" for descriptor in descriptors)
        script = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
        return subprocess.run(script, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("run", "why"),
    [(onto_full_disk, FULL), (without(1), CLOSED), (without(0, 1), CLOSED)],
    ids=["full", "closed", "both"],
)
@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_output_that_cannot_be_written_is_told_in_one_line(
    words: tuple[str, ...], run: Callable[[list[str]], subprocess.CompletedProcess[str]], why: str
) -> None:
    done = run([*COMMAND, *words])
    assert (done.returncode, done.stdout or "") == (1, "")
    assert done.stderr == f"embferry: the output cannot be written: {why}\n"


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_a_closed_pipe_ends_a_command_quietly(words: tuple[str, ...]) -> None:
    done = into_closed_pipe([*COMMAND, *words])
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("descriptors", [(0,), (2,), (0, 2), (1,), (0, 1, 2)])
def test_a_command_without_output_needs_no_streams(descriptors: tuple[int, ...], tmp_path: Path) -> None:
    key = tmp_path / "key"
    done = without(*descriptors)([*COMMAND, "keys", "new", str(key)])
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ("" if 2 in descriptors else f"made a cluster key in {key}\n")
    assert len(key.read_text().split()[-1]) == 64


def test_no_file_gets_the_number_of_a_stream_that_was_closed() -> None:
    script = "from embferry.cli.streams import open_missing; open_missing(); print(open('/dev/null').fileno() > 2)"
    assert without(0, 2)([sys.executable, "-c", script]).stdout == "True\n"


@pytest.mark.integration
def test_an_answer_that_nobody_takes_is_told_in_one_line() -> None:
    with router() as server:
        command = [sys.executable, "-m", "embferry", "ask", "what?", "--url", server.url]
        full, left = onto_full_disk(command), into_closed_pipe(command)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert (left.returncode, left.stderr) == (141, "")


@pytest.mark.integration
@pytest.mark.sweeps
@pytest.mark.parametrize(
    ("run", "status", "said"),
    [
        (onto_full_disk, 1, f"demo: the output cannot be written: {FULL}\n"),
        (without(1), 1, f"demo: the output cannot be written: {CLOSED}\n"),
        (into_closed_pipe, 141, ""),
    ],
    ids=["full", "closed", "left"],
)
def test_the_demo_ends_too(
    run: Callable[[list[str]], subprocess.CompletedProcess[str]], status: int, said: str
) -> None:
    done = run(DEMO)
    assert (done.returncode, done.stderr) == (status, said)
