"""Log lines that are not read: they are dropped and counted, and block no thread."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from embferry.observe import log_queue
from embferry.observe.log_queue import QueueHandler

LINES = 5000
PROGRAM = """
import logging, os, sys
from embferry.observe import log_queue, logs
log_queue.FLUSH_SECONDS = 0.05
logs.configure("info", "plain")
for number in range(30_000):
    logging.getLogger("x").info("%d %s", number, "x" * 1000)
os.write(1, b"%d" % logs.dropped_lines())
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def logger_to(fd: int) -> tuple[logging.Logger, QueueHandler]:
    log, handler = logging.Logger("test"), QueueHandler(fd)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    return log, handler


def read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(fd, 1 << 16)
    return data


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    log, handler = logger_to(pipe[1])
    reading = threading.Thread(target=lambda: seen.append(read_until(pipe[0], b"end\n")))
    seen: list[bytes] = []
    reading.start()
    for number in range(LINES):
        log.warning("line %d", number)
    log.warning("end")
    reading.join()
    assert seen[0].decode().splitlines() == [f"line {number}" for number in range(LINES)] + ["end"]
    handler.flush()
    assert handler.dropped == 0


def test_lines_that_nobody_reads_are_dropped_and_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_queue, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(log_queue, "MAX_LINES", 100)
    log, handler = logger_to(pipe[1])
    for _ in range(200_000 // 100):
        log.warning("x" * 100)
    handler.flush()  # returns, although nothing can be written
    assert handler.dropped > 0
    data = b""
    while handler._lines or handler._writing:
        data += os.read(pipe[0], 1 << 16)
    log.warning("end")
    data += read_until(pipe[0], b"end\n")
    told = sum(map(int, re.findall(rb"^(\d+) log lines were dropped", data, re.MULTILINE)))
    assert told == handler.dropped
    assert data.count(b"x" * 100 + b"\n") + told == 2000


def test_a_pipe_that_does_not_block_gets_all_lines(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    log, _ = logger_to(pipe[1])
    for _ in range(2000):
        log.warning("x" * 100)
    log.warning("end")
    assert len(read_until(pipe[0], b"end\n").splitlines()) == 2001


def test_a_long_line_is_cut_and_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    log, handler = logger_to(pipe[1])
    log.warning("x" * 200_000)
    assert read_until(pipe[0], b"(cut)\n").startswith(b"x" * log_queue.MAX_LINE_BYTES)
    reader, writer = os.pipe()
    os.close(reader)
    log, handler = logger_to(writer)
    log.warning("lost")
    handler.flush()
    os.close(writer)


def test_a_forked_child_logs_too(pipe: tuple[int, int]) -> None:
    log, handler = logger_to(pipe[1])
    log.warning("parent")
    handler.flush()
    child = os.fork()
    if not child:
        log.warning("child")
        handler.flush()
        os._exit(0)
    os.waitpid(child, 0)
    assert read_until(pipe[0], b"child\n") == b"parent\nchild\n"


@pytest.mark.integration
def test_a_process_whose_log_nobody_reads_goes_on_and_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.wait(100) == 0
        assert int(process.stdout.read()) > 10_000
