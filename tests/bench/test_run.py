"""Real processes: everybody who is installed, those who fail, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from embferry.bench import harness, meters
from embferry.bench.contestants import BY_KEY, Contestant
from embferry.bench.harness import Entry
from embferry.bench.payloads import parse
from embferry.bench.results import Measurement, load
from embferry.cli.main import app

pytestmark = pytest.mark.integration

TINY = parse("64KiB")
DEADLINE_S = 60.0
COMMAND = (sys.executable, "-c", "from embferry.cli.main import run; run()", "bench", "transfer")


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    """Of this process."""
    return psutil.Process().children(recursive=True)


def measure(tmp_path: Path, *contestants: Contestant, rounds: int = 2, timeout_s: float = 30.0) -> list[Measurement]:
    entries = [Entry(contestant, TINY) for contestant in contestants]
    return harness.measure(entries, rounds, str(tmp_path), timeout_s, lambda what, more: None)


def broken(name: str) -> Contestant:
    return Contestant(name.lower(), name, "peer", f"tests.bench.broken:{name}")


@pytest.mark.timeout(180)
def test_everybody_who_is_installed_carries_every_byte_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = set(os.listdir("/dev/shm"))
    monkeypatch.setenv("COLUMNS", "200")
    storage = tmp_path / "storage"
    storage.mkdir()
    words = ["--quick", "--payload", "64KiB", "--rounds", "2", "--out", str(tmp_path), "--storage", str(storage)]
    outcome = CliRunner().invoke(app, ["bench", "transfer", *words, "--markdown", str(tmp_path / "tables.md")])
    assert outcome.exit_code == 0, outcome.output

    results = load(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == results.schema
    for measurement in results.measurements:
        if measurement.status == "missing":
            assert measurement.reason
            continue
        assert measurement.status == "ok", f"{measurement.label}: {measurement.reason}"
        assert len(measurement.samples) == 2
        assert measurement.verified_rounds == 2  # the one that warms up, and the last
        assert all(sample.seconds > 0 for sample in measurement.samples)
    taking_part = {m.contestant for m in results.measurements if m.status == "ok"}
    assert {"copy/private", "socket", "zeromq/copied", "http-get", "shm/verified/in-place"} <= taking_part
    assert all(m.label in outcome.stdout for m in results.measurements)
    assert "<svg" in (tmp_path / "index.html").read_text()
    assert "| raw socket" in (tmp_path / "tables.md").read_text()

    assert workers() == []
    assert set(os.listdir("/dev/shm")) <= shared
    assert list(storage.iterdir()) == []


def test_one_that_fails_is_shown_with_its_last_words_and_the_others_go_on(tmp_path: Path) -> None:
    contestants = (broken("Killed"), broken("Raising"), broken("Wrong"), broken("Absent"), BY_KEY["socket"])
    killed, raising, wrong, absent, socket = measure(tmp_path, *contestants)
    assert killed.status == "error"
    assert "killed by SIGKILL" in killed.reason
    assert "the last words of an engine" in killed.reason
    assert (raising.status, "the transport is closed" in raising.reason) == ("error", True)
    assert (wrong.status, "not those that were sent" in wrong.reason) == ("error", True)
    assert (absent.status, absent.reason) == ("missing", "its licence is missing; buy one")
    assert (socket.status, len(socket.samples)) == ("ok", 2)
    assert workers() == []


def test_one_that_never_answers_runs_out_of_time(tmp_path: Path) -> None:
    silent, socket = measure(tmp_path, broken("Silent"), BY_KEY["socket"], timeout_s=5.0)
    assert silent.status == "error"
    assert "no answer" in silent.reason
    assert socket.status == "ok"
    assert workers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    words = ("--only", "socket", "--only", "shm/verified/in-place", "--payload", "64KiB", "--rounds", "100000")
    with open(tmp_path / "log", "w") as log:
        coordinator = subprocess.Popen(
            [*COMMAND, *words, "--out", str(tmp_path)],
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(tmp_path)},  # an empty folder of files remains after SIGKILL
        )
    children: list[psutil.Process] = []

    def running() -> bool:
        assert coordinator.poll() is None, (tmp_path / "log").read_text()
        children[:] = psutil.Process(coordinator.pid).children()
        return len(children) == 4 and any(child.status() == psutil.STATUS_STOPPED for child in children)

    until(running, "its workers take turns")
    coordinator.send_signal(number)
    status = coordinator.wait(DEADLINE_S)
    assert status == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    _gone, alive = psutil.wait_procs(children, DEADLINE_S)
    assert alive == []


def test_sent_bytes_are_those_of_all_tcp_sockets_of_the_process() -> None:
    import socket

    counter = meters.SentBytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), DEADLINE_S)
        accepted, _ = listener.accept()
        with client, accepted:
            client.sendall(b"x" * 1000)
            accepted.sendall(b"y" * 20)
            assert len(accepted.recv(1000, socket.MSG_WAITALL)) == 1000
            assert len(client.recv(20, socket.MSG_WAITALL)) == 20
            assert counter.delta() == 1020
            assert counter.delta() == 0


def test_the_peak_of_memory_is_seen() -> None:
    meters.reset_peak()
    before = meters.memory("VmHWM")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert meters.memory("VmHWM") - before >= 60 << 20
