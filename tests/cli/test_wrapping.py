"""The text of answers: on a terminal it is broken between words, however it arrives; elsewhere it stays as it is."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from embferry.cli.wrapping import Wrapped, columns, folded
from tests.cli.servers import router

TEXT = "There is a red circle to the left of a blue square, and under both of them a green triangle.\n\nNo more."


def wrapped(text: str, width: int, step: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what is written of a text that arrives in pieces of ``step`` characters."""
    writer = Wrapped(width)
    for at in range(0, len(text), step):
        writer.write(text[at : at + step])
    writer.end()
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
@pytest.mark.parametrize("width", [12, 20, 79, 80, 200])
def test_lines_fit_and_no_word_is_lost(width: int, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = wrapped(TEXT, width, step, capsys)
    assert max(map(len, found.split("\n"))) <= width
    assert found.split() == TEXT.split()
    assert "\n\nNo more." in found


def test_a_line_takes_as_many_words_as_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrapped("aaa bbb ccc ddd", 11, 1, capsys) == "aaa bbb ccc\nddd"
    assert wrapped("aaa bbb ccc ddd", 10, 1, capsys) == "aaa bbb\nccc ddd"


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_a_word_longer_than_a_line_is_left_to_the_terminal(step: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = wrapped("a " + "x" * 100 + " b", 10, step, capsys)
    assert found.replace("\n", "").replace(" ", "") == "a" + "x" * 100 + "b"


def test_letters_of_east_asia_are_two_wide() -> None:
    assert (columns("abc"), columns("\u7ea2\u8272"), columns("e\u0301")) == (3, 4, 1)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in wrapped("a \x1b[2J b \x9b c", 40, 1, capsys)


def test_elsewhere_nothing_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrapped("x \x1b " * 100, 0, 7, capsys) == "x \x1b " * 100


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_sentence_is_broken_at_spaces_alone(width: int) -> None:
    text = "no server responds at http://127.0.0.1:8000-and-more/at-all; start one with: embferry serve \u7ea2\u8272"
    lines = folded(text, width).split("\n")
    assert " ".join(lines) == text
    assert [line for line in lines if columns(line) > width and " " in line] == []
    assert folded(text, 0) == text


TOLD = """
import sys
import typer
from embferry.cli.options import fail, tell
tell("note: " + "some words " * 20)
try:
    fail("wrong " * 30)
except typer.Exit:
    sys.exit(0)
"""


def on_terminal(stream: str, command: list[str], environ: dict[str, str]) -> str:
    """Returns what a command writes to its standard output or standard error if that is a terminal."""
    reader, writer = pty.openpty()
    try:
        subprocess.run(command, **{stream: writer}, env=environ, check=True)
        return os.read(reader, 1 << 16).decode().replace("\r\n", "\n")
    finally:
        os.close(reader)
        os.close(writer)


def test_what_goes_wrong_is_broken_on_a_terminal_alone() -> None:
    environ = {**os.environ, "COLUMNS": "50"}
    command = [sys.executable, "-c", TOLD]
    plain = subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stderr
    assert plain.count("\n") == 2
    shown = on_terminal("stderr", command, environ)
    assert max(map(len, shown.splitlines())) <= 50
    assert shown.split() == plain.split()


@pytest.mark.integration
def test_ask_breaks_lines_on_a_terminal_alone() -> None:
    with router() as server:
        server.answer = [TEXT[at : at + 4] for at in range(0, len(TEXT), 4)]
        command = [sys.executable, "-m", "embferry", "ask", "what?", "--url", server.url]
        environ = {**os.environ, "COLUMNS": "30"}
        assert subprocess.run(command, capture_output=True, text=True, env=environ, check=True).stdout == TEXT + "\n"
        shown = on_terminal("stdout", command, environ)
    assert max(map(len, shown.splitlines())) <= 30
    assert shown.split() == TEXT.split()
