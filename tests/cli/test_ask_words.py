"""The words of ``embferry ask``: addresses as people write them, standard input, and files without a question."""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import pytest
import typer

from embferry.cli.ask_words import base_url, content
from tests.serve import pictures

PNG = pictures.png()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("http://h:8000/v1/chat/completions", "http://h:8000"),
        ("https://h/proxy/v1", "https://h/proxy"),
        ("h:8000", "http://h:8000"),
        ("localhost", "http://localhost"),
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        (" [::1]:8000 ", "http://[::1]:8000"),
        ("http://h/v11", "http://h/v11"),
    ],
)
def test_an_address_is_read_as_it_is_meant(given: str, meant: str) -> None:
    assert base_url(given, "http") == meant


def test_an_address_without_a_scheme_speaks_tls_where_a_ca_is_given() -> None:
    assert base_url("h:8000", "https") == "https://h:8000"


class Input(io.TextIOWrapper):
    """Standard input with bytes in it."""

    def __init__(self, data: bytes, *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def read(monkeypatch: pytest.MonkeyPatch, data: bytes, *words: str, tty: bool = False) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "stdin", Input(data, tty=tty))
    return content(list(words))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image_url"),
        (b"\x00\x00\x00\x20ftypisom", "video_url"),
        (b"\x00\x00\x00\x20ftypavif", "image_url"),
        (b"\x1aE\xdf\xa3....", "video_url"),
        (b"RIFF....AVI LIST", "video_url"),
        (b"RIFF....WEBPVP8 ", "image_url"),
    ],
)
def test_a_file_on_standard_input_is_a_picture_or_video_by_its_bytes(
    data: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
    parts = read(monkeypatch, data, "-", "what is there?")
    assert parts == [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what is there?"}]


def test_the_question_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, "was ist das\u2026?\n".encode(), "-") == [{"type": "text", "text": "was ist das\u2026?"}]


@pytest.mark.parametrize(
    ("words", "data", "tty", "why"),
    [
        (("-", "-"), b"x", False, "can be read once"),
        (("-",), PNG, False, "no question: standard input is no text"),
        (("-",), b" \n", False, "standard input has no question"),
        (("-", "what?"), b"", False, "standard input is empty"),
        (("-", "what?"), b"", True, "which is a terminal; pipe it in"),
        (("a.png",), b"", False, "no question: add one after a.png"),
        (("a.png", "https://h/b.mp4"), b"", False, "no question: add one after https://h/b.mp4"),
        (("what is there?", "a.png"), b"", False, "question comes last: embferry ask a.png 'what is there?'"),
        (("b.png", "why?", "a.png"), b"", False, "question comes last: embferry ask b.png a.png 'why?'"),
        (("-", "why?", "a.png"), PNG, False, "question comes last: embferry ask - a.png 'why?'"),
        (("a.png", ""), b"", False, "the question is empty; write one, in quotes"),
        (("",), b"", False, "the question is empty; write one, in quotes"),
        (("a.png", " \n\t"), b"", False, "the question is empty; write one, in quotes"),
        (("", "what?"), b"", False, "an empty word is no file"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: tuple[str, ...],
    data: bytes,
    tty: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as ended:
        read(monkeypatch, data, *words, tty=tty)
    assert ended.value.exit_code == 2
    assert why in capsys.readouterr().err
