"""Log lines of a whole process: each names it, in JSON each is an object, and rooms lead to their requests."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest

from embferry.observe import logs
from embferry.observe.foreign_lines import level_of, read_lines
from embferry.observe.logs import about, configure, set_worker

NOISY = """
import ctypes, logging, os, subprocess, sys, threading, warnings
from embferry.observe.logs import configure, own_process, set_worker
own_process()
configure("info", {style!r}, "encode-7")
set_worker("encode-1-ab")
logging.getLogger("uvicorn.error").warning("of a library")
warnings.warn("something is old", DeprecationWarning)
print("printed")
print("to stderr, WARNING: watch out", file=sys.stderr)
ctypes.CDLL(None).dprintf(2, b"of a library in C\\n")
subprocess.run(["sh", "-c", "echo of another program >&2"])
thread = threading.Thread(target=lambda: 1 / 0, name="worker-thread")
thread.start()
thread.join()
class Bad:
    def __del__(self):
        raise ValueError("in a finalizer")
Bad()
logging.getLogger("embferry.x").info("two\\nlines")
raise RuntimeError("the end")
"""


def run(style: str) -> str:
    """Returns what a process writes in which everything that can write does so, and which ends with an exception."""
    command = [sys.executable, "-W", "always", "-c", NOISY.format(style=style)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 1
    assert style == "plain" or done.stdout == ""
    return done.stderr


def test_every_line_is_json_also_of_libraries_and_other_programs() -> None:
    lines = [json.loads(line) for line in run("json").splitlines()]
    assert {(line["process"], line["worker"]) for line in lines} == {("encode-7", "encode-1-ab")}
    assert len({line["pid"] for line in lines}) == 1
    told = "\n".join(line["message"] for line in lines)
    for text in (
        "of a library", "something is old", "printed", "watch out", "of a library in C", "of another program",
        "uncaught in worker-thread: ZeroDivisionError", "in a finalizer", "two\\nlines",
        "uncaught: RuntimeError('the end')",
    ):  # fmt: skip
        assert text in told
    (end,) = [line for line in lines if "the end" in line["message"]]
    assert end["level"] == "critical"
    assert end["exception"].startswith("Traceback")
    (warned,) = [line for line in lines if "watch out" in line["message"]]
    assert (warned["level"], warned["logger"]) == ("warning", "stderr")


def test_uncaught_exceptions_are_log_lines_in_plain_too() -> None:
    lines = run("plain").splitlines()
    (end,) = [number for number, line in enumerate(lines) if "uncaught: RuntimeError" in line]
    assert "encode-7[" in lines[end]
    assert all(line.startswith("  ") for line in lines[end + 1 :])


def test_a_line_names_its_process_and_worker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_process", logs._Process())
    log = logging.getLogger("embferry.x")
    configure("info", "plain", "encode-0")
    log.info("hello")
    configure("info", "json")
    set_worker("encode-5-ab")
    log.info("hello")
    log.info("about another", extra={"worker": "language-6-cd"})
    plain, first, second = capsys.readouterr().err.splitlines()
    assert plain.endswith(f"info    encode-0[{os.getpid()}] embferry.x: hello")
    known = {"process": "encode-0", "pid": os.getpid(), "worker": "encode-5-ab", "logger": "embferry.x"}
    assert known.items() <= json.loads(first).items()
    assert json.loads(second)["worker"] == "language-6-cd"


def test_lines_about_a_room_lead_to_its_request_from_every_thread(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    log = logging.getLogger("embferry.transfer.x")
    with about(request_id="mine", room=7_001):
        pass
    elsewhere = threading.Thread(target=log.warning, args=("room %d: lost", 7_001), kwargs={"extra": {"room": 7_001}})
    elsewhere.start()
    elsewhere.join()
    log.warning("of no request", extra={"room": 7_002})
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["room"], first["request_id"]) == (7_001, "mine")
    assert (second["room"], "request_id" in second) == (7_002, False)


def test_the_requests_of_rooms_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_rooms", OrderedDict())
    for room in range(logs.MAX_ROOMS + 5):
        with about(request_id="r", room=room):
            pass
    assert len(logs._rooms) == logs.MAX_ROOMS
    assert 0 not in logs._rooms


COLOURED = """
import logging
from embferry.observe.logs import configure
configure("info", "plain", "router")
logging.getLogger("embferry.x").warning("look")
"""
REQUEST = """
import asyncio
from prometheus_client import Counter
from embferry.observe.logs import configure
from embferry.serve.http.edge import Edge
configure("info", {style!r}, "router")
async def app(scope, receive, send):
    scope["state"]["client"] = "address 127.0.0.1"
    scope["state"]["facts"] = {facts!r}
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
scope = {{"type": "http", "method": "POST", "path": "/healthz", "headers": [(b"host", b"h")]}}
async def send(message): pass
asyncio.run(Edge(app, Counter("n", "n", ["path", "status"]), frozenset(), None, app)(scope, None, send))
"""


@pytest.mark.parametrize(
    ("terminal", "environ", "coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_short_lines_and_colours_are_for_terminals_alone(
    terminal: bool, environ: dict[str, str], coloured: bool, tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("TERM", "NO_COLOR")}
    reader, writer = pty.openpty() if terminal else os.pipe()
    try:
        subprocess.run([sys.executable, "-c", COLOURED], stderr=writer, env={**kept, **environ}, check=True)
        text = os.read(reader, 4096).decode()
    finally:
        os.close(reader)
        os.close(writer)
    assert ("\x1b[" in text) == coloured
    line = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    short, whole = r"\d\d:\d\d:\d\d warning router: look", r"[\d:]{8}\.\d{3} warning router\[\d+\] embferry\.x: look"
    assert re.fullmatch(short if terminal else whole, line), line


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"room": 5, "outcome": "answered", "tokens": 9, "transfer_transport": "shm"}, ""),
        ({"outcome": "no_worker", "error": "no worker is there"}, "; no worker is there"),
        ({"outcome": "client left"}, "; client left"),
        ({"ignored": "temprature"}, "; ignored: temprature"),
    ],
)
def test_the_line_of_a_request_is_short_on_a_terminal_alone(facts: dict[str, object], told: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TERM"}
    plain, whole = ([sys.executable, "-c", REQUEST.format(style=style, facts=facts)] for style in ("plain", "json"))
    reader, writer = pty.openpty()
    try:
        subprocess.run(plain, stderr=writer, env=environ, check=True)
        line = os.read(reader, 4096).decode().rstrip()
    finally:
        os.close(reader)
        os.close(writer)
    assert re.fullmatch(rf"\S{{8}} info    router: POST /healthz: 200 in [\d.]+ s{re.escape(told)}", line), line
    (as_json,) = subprocess.run(whole, capture_output=True, text=True, env=environ, check=True).stderr.splitlines()
    assert facts.items() <= json.loads(as_json).items()
    assert "short" not in json.loads(as_json)
    in_file = subprocess.run(plain, capture_output=True, text=True, env=environ, check=True).stderr
    assert all(f" {name}=" in in_file for name in (*facts, "request", "method", "client"))
    assert "short" not in in_file


def test_lines_of_other_programs_are_cut_and_have_a_level() -> None:
    found: list[str] = []
    reader, writer = os.pipe()
    thread = read_lines(reader, found.append, "test")
    os.write(writer, b"one\r50 %\r100 %\n\n\x1b[31mred\x1b[0m\n" + b"x" * 20_000 + b"\nlast")
    os.close(writer)
    thread.join()
    assert found[:4] == ["one", "50 %", "100 %", "red"]
    assert [len(line) for line in found[4:-1]] == [8192, 8192, 20_000 - 2 * 8192]
    assert found[-1] == "last"
    assert level_of("(EngineCore pid=12) ERROR 11-29 17:00:00 [core.py:1] boom") == logging.ERROR
    assert level_of("INFO 11-29 17:00:00 [x.py:1] an ERROR of old") == logging.INFO
    assert level_of("Traceback (most recent call last):") == logging.INFO
