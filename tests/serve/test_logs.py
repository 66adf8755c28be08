"""Log lines, plain and JSON, with the ids of request and room."""

from __future__ import annotations

import json
import logging
import os

import pytest

from embferry.observe.logs import about, configure


def test_json_log_lines_carry_request_room_and_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json", "router")
    log = logging.getLogger("embferry.x")
    with about(request_id="r1"), about(room=7):
        log.info("hello %s", "you", extra={"tokens": 5})
    log.debug("unseen")
    log.warning("later", extra={"room": 9_000_000})
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "process": "router", "pid": os.getpid(),
        "level": "info", "logger": "embferry.x", "message": "hello you", "request_id": "r1", "room": 7, "tokens": 5,
    }  # fmt: skip
    assert (second["message"], second["room"], "request_id" in second) == ("later", 9_000_000, False)


def test_plain_log_lines_carry_request_room_and_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug", "plain", "router")
    with about(request_id="r1", room=7):
        logging.getLogger("embferry.x").debug("hello", extra={"tokens": 5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"debug   router[{os.getpid()}] embferry.x: hello request=r1 room=7 tokens=5")


@pytest.mark.parametrize("style", ["plain", "json"])
def test_a_logged_exception_is_in_the_log_line(capsys: pytest.CaptureFixture[str], style: str) -> None:
    configure("info", style)
    try:
        raise ValueError("a reason")
    except ValueError:
        logging.getLogger("embferry.x").exception("failed")
    err = capsys.readouterr().err
    assert "ValueError: a reason" in err
    assert style == "plain" or len(err.splitlines()) == 1


FORGED = "x\n12:00:00.000 info    embferry.serve.http.edge: request path=/v1/models\r\x1b[2J\u2028"


@pytest.mark.parametrize("style", ["plain", "json"])
def test_no_text_from_outside_makes_a_line_of_its_own(capsys: pytest.CaptureFixture[str], style: str) -> None:
    configure("info", style)
    log = logging.getLogger("embferry.x")
    log.info("refused: %s", FORGED, extra={"path": FORGED})
    log.info("refused: %s", "y" * 20_000_000, extra={"path": "z" * 20_000_000, "parts": ["w" * 20_000_000]})
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert "\x1b" not in err
    assert len(err) < 20_000


def test_a_line_of_a_traceback_looks_like_no_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "plain")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("embferry.x").exception("failed")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("failed")
    assert rest
    assert all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("two words", '"two words"'),
        ('a "word"', '"a \\"word\\""'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("Größe 5", '"Größe 5"'),
        ("http://10.0.0.1:8001", "http://10.0.0.1:8001"),
        (7, "7"),
        (["a", 1], "\"['a', 1]\""),
    ],
)
def test_a_value_of_a_plain_line_is_quoted_where_its_end_is_unclear(
    capsys: pytest.CaptureFixture[str], value: object, written: str
) -> None:
    configure("info", "plain")
    logging.getLogger("test").info("it failed", extra={"error": value, "code": 3})
    assert capsys.readouterr().err.rstrip("\n").endswith(f" test: it failed error={written} code=3")
