"""Text for a terminal as it arrives, broken between words. Elsewhere, such as in a pipe, it stays as it is."""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from typing import TextIO

import typer

_WORDS = re.compile(r"\n|[^\S\n]+|\S+")
_CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}, "\ufffd")
"""Control characters, which could move the cursor or recolour the screen."""


class Wrapped:
    """Writes to standard output; a word only when it is whole, or fills a line.

    Args:
        width: columns of the terminal; 0 for no terminal.
    """

    def __init__(self, width: int | None = None) -> None:
        self._width = width_of(sys.stdout) if width is None else width
        self._column = 0
        self._space = self._word = ""

    def write(self, text: str) -> None:
        """Writes the words that are whole now."""
        if not self._width:
            typer.echo(text, nl=False)
            return
        written = []
        for piece in _WORDS.findall(text.translate(_CONTROL)):
            if not piece.isspace():
                self._word += piece
                if columns(self._word) < self._width:
                    continue
            written.append(self._take_word())
            if piece == "\n":
                written.append("\n")
                self._column, self._space = 0, ""
            elif piece.isspace():
                self._space += piece
        typer.echo("".join(written), nl=False)

    def end(self) -> None:
        """Writes the last word, and ends the line."""
        typer.echo(self._take_word())

    def _take_word(self) -> str:
        """Returns the word behind its space or, where it does not fit, on the next line."""
        if not self._word:
            return ""
        space, word = self._space, self._word
        self._space = self._word = ""
        end = self._column + columns(space) + columns(word)
        if self._column and end > self._width:
            space, end = "\n", columns(word)
        self._column = end % self._width if end > self._width else end
        return space + word


def width_of(stream: TextIO) -> int:
    """Returns the columns of the terminal that a stream writes to; 0 if it is none."""
    if not stream.isatty():
        return 0
    if os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def folded(text: str, width: int) -> str:
    """Returns a text whose lines have at most so many columns, broken at spaces alone; 0: unchanged."""
    if not width:
        return text
    lines = []
    for line in text.split("\n"):
        first, *words = line.split(" ")
        lines.append(first)
        for word in words:
            longer = f"{lines[-1]} {word}"
            if columns(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def columns(text: str) -> int:
    """Returns the columns of a text on a terminal: letters of East Asia are two wide, and marks on letters none."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)
