"""A signal ends a process wherever it comes: also in a thread that runs no handler, while the main one waits."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embferry.serve.http.address import get
from tests.ports import free_port

pytestmark = pytest.mark.integration

DEADLINE = 300.0
WAITER = """
import threading
from embferry.serve.end_signals import EndSignals
threading.Thread(target=threading.Event().wait, daemon=True).start()
with EndSignals(handle=lambda: print("handled", flush=True)) as signals:
    print("waits", flush=True)
    signals.wait()
    print("over", flush=True)
"""
AT_FIRST = """
import os, signal
from embferry.serve.end_signals import EndSignals
with EndSignals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    signals.wait()
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
assert before == [signal.default_int_handler, signal.SIG_DFL], before
assert signal.set_wakeup_fd(-1) == -1
"""

Send = Callable[[int, int], None]


def to_the_process(pid: int, number: int) -> None:
    os.kill(pid, number)


def to_another_thread(pid: int, number: int) -> None:
    """Sends a signal to a thread that is not the main one, which does not run and is not woken by it."""
    others = [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.tgkill(pid, others[0], number) == 0, os.strerror(ctypes.get_errno())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_blocked(pid: int) -> bool:
    """Returns whether the main thread is in a call that blocks."""
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


BOTH = pytest.mark.parametrize("send", [to_the_process, to_another_thread])


@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_wait_ends_after_the_handler(send: Send, number: int) -> None:
    with running("-c", WAITER) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        until(lambda: is_blocked(process.pid))
        send(process.pid, number)
        assert process.stdout.read() == "handled\nover\n"
        assert process.wait(DEADLINE) == 0


def test_a_signal_before_the_wait_counts_and_all_is_as_before_at_the_end() -> None:
    with running("-c", AT_FIRST) as process:
        assert process.wait(DEADLINE) == 0


@BOTH
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_bootstrap_server_ends_cleanly(send: Send, number: int, status: int) -> None:
    port = free_port()
    with running("-m", "embferry", "bootstrap", "--port", str(port)) as process:
        until(lambda: get(f"http://127.0.0.1:{port}", "/health", 1.0)[0] == 200)
        send(process.pid, number)
        assert process.wait(DEADLINE) == status
