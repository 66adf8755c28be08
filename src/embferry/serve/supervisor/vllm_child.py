"""``python -m embferry.serve.supervisor.vllm_child``: one ``vllm serve``, started by the supervisor.

vLLM does not end with its parent, so this process stands between the two: when its standard input ends, or at a signal,
it ends everything that vLLM has started. The supervisor's line is a JSON object with ``command``, ``environ``, ``url``
and ``log``: level, style and the name of this process. What vLLM writes goes line by line into the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from embferry.observe.foreign_lines import level_of, read_lines
from embferry.observe.logs import configure, own_process
from embferry.serve.http.address import get
from embferry.serve.supervisor.handover import SupervisorPipes

vllm_log = logging.getLogger("vllm")

PR_SET_PDEATHSIG = 1
READ_SECONDS = 1.0
"""Seconds for the last lines of a vLLM that has ended."""
_ERROR = re.compile(r"\b(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception): .+|\berror: .+")
"""The last line of a traceback, or that of a wrong argument."""
POLL_SECONDS = 0.25
PROBE_SECONDS = 5.0
SERVER_SECONDS, ENGINES_SECONDS, TRACKER_SECONDS = 6.0, 2.0, 1.0
"""Seconds that vLLM's server gets for an orderly end, then its engines, and then the resource tracker, when all others
are dead. Together less than ``serve.stop_timeout``, after which the supervisor kills this process."""


def main() -> None:
    pipes = SupervisorPipes()
    told: dict[str, Any] = json.loads(pipes.first_line())
    own_process()
    configure(*told["log"])
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    reader, writer = os.pipe()
    output = VllmOutput()
    process = subprocess.Popen(
        told["command"],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=os.environ | told["environ"],
        process_group=0,
        preexec_fn=_end_with_this_process,
    )
    os.close(writer)
    reading = read_lines(reader, output.line, "vllm-output")
    pipes.on_supervisor_end(ending.set)
    reported = False
    try:
        while process.poll() is None and not ending.wait(POLL_SECONDS):
            if not reported and get(told["url"], "/health", PROBE_SECONDS)[0] == 200:
                pipes.report(told["url"])
                reported = True
    finally:
        _end(process)
    reading.join(READ_SECONDS)
    if not (reported or ending.is_set()):
        pipes.fail(f"vllm serve ended with status {process.returncode}: {output.reason or 'its lines above say why'}")
    sys.exit(0 if ending.is_set() else process.returncode if process.returncode > 0 else 1)


class VllmOutput:
    """Logs the lines that vLLM writes.

    Attributes:
        reason: the last error that one of them names; empty if none does.
    """

    def __init__(self) -> None:
        self.reason = ""

    def line(self, text: str) -> None:
        """Logs one line. Runs on the reading thread."""
        if found := _ERROR.search(text):
            self.reason = found[0]
        vllm_log.log(level_of(text), "%s", text)


def _end_with_this_process() -> None:
    """Has the kernel send SIGTERM to vLLM when this process is killed. Runs in the new process, before vLLM.

    prctl(2), PR_SET_PDEATHSIG goes by the thread that started the process, which is the main thread.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends vLLM's server, then its engines, then the rest of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SERVER_SECONDS)
    process.kill()
    process.wait()
    group = process.pid
    if _signal_and_wait(group, signal.SIGTERM, ENGINES_SECONDS):
        return
    for pid in _members(group):
        if not _is_resource_tracker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _signal_and_wait(group, 0, TRACKER_SECONDS)
    _signal_and_wait(group, signal.SIGKILL, 0)


def _signal_and_wait(group: int, number: int, seconds: float) -> bool:
    """Sends a signal to a process group and returns whether the group is empty within that time."""
    deadline = time.monotonic() + seconds
    try:
        os.killpg(group, number)
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(POLL_SECONDS / 5)
    except ProcessLookupError:
        return True
    return False


def _members(group: int) -> list[int]:
    """Returns the processes of a process group."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(int(name)) == group:
                found.append(int(name))
    return found


def _is_resource_tracker(pid: int) -> bool:
    """Says whether this is Python's resource tracker, which ignores SIGTERM.

    It ends by itself after the processes it works for, and removes the shared memory that they have left: vLLM's ring
    of 160 MB. So it has to go last.
    """
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


if __name__ == "__main__":
    main()
