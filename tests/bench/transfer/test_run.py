"""Real processes: all installed candidates, candidates that fail, and nothing left behind."""

from __future__ import annotations

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

from embferry.bench.machine import size
from embferry.bench.results import load
from embferry.bench.transfer import rounds
from embferry.bench.transfer.candidates import Candidate
from embferry.bench.transfer.payloads import Payload, parse
from embferry.bench.transfer.results import Measurement, TransferResults
from embferry.bench.transfer.rounds import Entry
from embferry.bench.transfer.small import WARM_UP
from embferry.bench.transfer.sweeps import QUIET
from embferry.bench.transfer.worker import reset_peak
from embferry.cli.main import app
from tests.bench.transfer.examples import BY_KEY

pytestmark = [pytest.mark.integration, pytest.mark.sweeps]

TINY = parse("64KiB")
DEADLINE_S = 60.0
COMMAND = (sys.executable, "-c", "from embferry.cli.main import run; run()", "bench", "transfer")


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


Workers = Callable[[], list[psutil.Process]]


@pytest.fixture
def workers() -> Workers:
    """Returns the child processes of this process that a test has started and not ended."""
    before = psutil.Process().children(recursive=True)
    return lambda: [process for process in psutil.Process().children(recursive=True) if process not in before]


def measure(
    tmp_path: Path, *candidates: Candidate, timeout_s: float = 30.0, payload: Payload = TINY
) -> list[Measurement]:
    entries = [Entry(candidate, payload) for candidate in candidates]
    return rounds.measure(entries, 2, str(tmp_path), lambda what, more: None, timeout_s)


def broken(name: str) -> Candidate:
    return Candidate(name.lower(), name, "peer", f"tests.bench.transfer.broken_candidates:{name}")


def swept(**options: object) -> Candidate:
    full = {"transport": "shm", "mode": "verified", "in_place": False} | options
    return Candidate("swept", "swept", "ours", "embferry.bench.transfer.library:Embferry", full)


@pytest.mark.timeout(180)
def test_every_installed_candidate_carries_every_byte_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    shared = set(os.listdir("/dev/shm"))
    monkeypatch.setenv("COLUMNS", "200")
    storage = tmp_path / "storage"
    storage.mkdir()
    words = ["--quick", "--payload", "64KiB", "--rounds", "2", "--out", str(tmp_path), "--storage", str(storage)]
    outcome = CliRunner().invoke(app, ["bench", "transfer", *words, "--markdown", str(tmp_path / "tables.md")])
    assert outcome.exit_code == 0, outcome.output

    results = load(tmp_path / "results.json", TransferResults)
    assert results.complete
    for measurement in results.measurements:
        if measurement.status == "missing":
            assert measurement.reason
            continue
        assert measurement.status == "ok", f"{measurement.label}: {measurement.reason}"
        assert len(measurement.samples) == 2, measurement.label
        assert all(sample.seconds > 0 for sample in measurement.samples)
    taking_part = {m.candidate for m in results.measurements if m.status == "ok"}
    assert {"copy/private", "socket", "zeromq/copied", "http-get", "shm/verified/in-place"} <= taking_part
    assert all(m.label in outcome.stdout for m in results.measurements)
    assert "<svg" in (tmp_path / "index.html").read_text()
    assert "| raw socket" in (tmp_path / "tables.md").read_text()

    assert workers() == []
    assert set(os.listdir("/dev/shm")) <= shared
    assert list(storage.iterdir()) == []


def test_a_candidate_that_fails_is_reported_with_its_last_lines_and_the_others_go_on(
    tmp_path: Path, workers: Workers
) -> None:
    candidates = (broken("Killed"), broken("Raising"), broken("Wrong"), broken("Absent"), BY_KEY["socket"])
    killed, raising, wrong, absent, socket = measure(tmp_path, *candidates)
    assert killed.status == "error"
    assert "SIGKILL" in killed.reason
    assert "the last line of an engine" in killed.reason
    assert (raising.status, "the network is down" in raising.reason) == ("error", True)
    assert (wrong.status, "not those that were sent" in wrong.reason) == ("error", True)
    assert (absent.status, absent.reason) == ("missing", "its licence is missing; buy one")
    assert (socket.status, len(socket.samples)) == ("ok", 2)
    assert workers() == []


def test_a_candidate_that_never_answers_runs_out_of_time(tmp_path: Path, workers: Workers) -> None:
    silent, socket = measure(tmp_path, broken("Silent"), BY_KEY["socket"], timeout_s=10.0)
    assert silent.status == "error"
    assert "no answer" in silent.reason
    assert socket.status == "ok"
    assert workers() == []


@pytest.mark.timeout(180)
def test_every_setting_of_the_sweeps_carries_every_byte(tmp_path: Path) -> None:
    candidates = (
        swept(pool_tokens=16, block_tokens=1),
        swept(rooms=[64, 2, 2], pool_tokens=40, block_tokens=1),
        swept(early=False, in_place=True),
    )
    pool, several, late = found = measure(tmp_path, *candidates, payload=parse("2MiB"))
    assert [(m.status, m.reason, len(m.samples)) for m in found] == [("ok", "", 2)] * 3
    assert (pool.samples[-1].transfers or 0) > 1
    assert all(0 < wait <= several.samples[-1].seconds for wait in several.samples[-1].waits)
    assert [len(m.samples[-1].waits) for m in found] == [0, 3, 0]
    assert late.samples[-1].transfers == 1


@pytest.mark.timeout(180)
def test_every_way_to_send_many_small_embeddings_carries_their_bytes(tmp_path: Path, workers: Workers) -> None:
    one, together = (f"embferry.bench.transfer.small:{name}" for name in ("OneByOne", "AtOnce"))
    few = {"transport": "shm", "mode": "verified", "tokens": 2, "count": 8, "pool_tokens": 64, "block_tokens": 1}
    candidates = (
        Candidate("alone", "alone", "ours", one, few | {"in_place": True}),
        Candidate("rooms", "rooms", "ours", one, few | {"open": 9, "settings": QUIET}),
        Candidate("behind", "behind", "ours", one, few | {"large": True}),
        Candidate("together", "together", "ours", together, few | {"transport": "tcp", "at_once": 3}),
    )
    found = measure(tmp_path, *candidates, payload=parse("16MiB"))
    assert [(m.status, m.reason, len(m.samples)) for m in found] == [("ok", "", 2)] * 4
    alone, rooms, behind, together_ones = (m.samples[-1].waits for m in found)
    assert len(alone) == len(rooms) == 8 - WARM_UP
    assert len(behind) <= 8 - WARM_UP
    assert together_ones == []
    assert all(0 < wait < found[0].samples[-1].seconds for wait in alone)
    assert workers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_when_the_command_is_interrupted_or_killed(tmp_path: Path, number: signal.Signals) -> None:
    words = ("--only", "socket", "--only", "shm/verified/in-place", "--payload", "64KiB", "--rounds", "100000")
    with open(tmp_path / "log", "w") as log:
        coordinator = subprocess.Popen(
            [*COMMAND, *words, "--out", str(tmp_path)],
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(tmp_path)},  # after SIGKILL, the shared folder remains
        )
    children: list[psutil.Process] = []

    def running() -> bool:
        assert coordinator.poll() is None, (tmp_path / "log").read_text()
        children[:] = psutil.Process(coordinator.pid).children()
        return len(children) == 4 and any(child.status() == psutil.STATUS_STOPPED for child in children)

    until(running, "the workers take turns")
    coordinator.send_signal(number)
    status = coordinator.wait(DEADLINE_S)
    assert status == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    _gone, alive = psutil.wait_procs(children, DEADLINE_S)
    assert alive == []


def test_the_peak_of_memory_is_measured() -> None:
    reset_peak()
    before = size("/proc/self/status", "VmHWM")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert size("/proc/self/status", "VmHWM") - before >= 60 << 20
