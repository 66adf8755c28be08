"""``python -m embferry.serve.supervisor.vllm_child``: one ``vllm serve``, started by the supervisor.

vLLM does not end with its parent, so this process stands between the two: when its standard input ends, or at a signal,
it ends everything that vLLM has started, which may have left its process group. When this process is killed, the
supervisor does that. The supervisor's line is a JSON object with ``command``, ``environ``, ``url``, ``seconds`` for
the end, ``folder`` for temporary files, and ``log``: level, style and the name of this process. What vLLM writes goes
line by line into the log.
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
from embferry.serve.supervisor import temporary
from embferry.serve.supervisor.descendants import adopt_orphans, end_descendants, reap_adopted
from embferry.serve.supervisor.handover import SupervisorPipes

vllm_log = logging.getLogger("vllm")

PR_SET_PDEATHSIG = 1
READ_SECONDS = 1.0
"""Seconds for the last lines of a vLLM that has ended."""
_ERROR = re.compile(r"\b(?:[A-Za-z_]\w*\.)*(?:[A-Za-z_]\w*)?(?:Error|Exception): .+|\berror: .+")
"""The last line of a traceback, or that of a wrong argument."""
_ELSEWHERE = "root cause"
"""Words of an error that only points to an earlier one: of the process of an engine, or of a worker."""
CHILD_SHARE = 0.8
"""The part of the time for the end of an instance in which this process ends it; after the rest, it is killed."""
POLL_SECONDS = 0.25
PROBE_SECONDS = 5.0
SERVER_SHARE, STARTING_SHARE, ENGINES_SHARE = 0.6, 0.1, 0.2
"""Parts of the time for the end: for the orderly end of vLLM's server, or of one that has not answered yet; then for
that of its engines. The rest is for its resource tracker, when all others are dead."""


def main() -> None:
    pipes = SupervisorPipes()
    told: dict[str, Any] = json.loads(pipes.first_line())
    own_process()
    configure(*told["log"])
    adopt_orphans()
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    folder = Path(told["folder"])
    lock = temporary.hold(folder.parent)
    folder.mkdir(exist_ok=True)
    reader, writer = os.pipe()
    output = VllmOutput(ending)
    process = subprocess.Popen(
        told["command"],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=os.environ | temporary.environ(folder) | told["environ"],
        process_group=0,
        preexec_fn=_end_with_this_process,
    )
    os.close(writer)
    reading = read_lines(reader, output.line, "vllm-output")
    pipes.on_supervisor_end(ending.set)
    reported = False
    try:
        while process.poll() is None and not ending.wait(POLL_SECONDS):
            reap_adopted(process.pid)
            if not reported and get(told["url"], "/health", PROBE_SECONDS)[0] == 200:
                pipes.report(told["url"])
                reported = True
    finally:
        left = told["seconds"] if pipes.seconds is None else min(told["seconds"], CHILD_SHARE * pipes.seconds)
        _end(process, max(0.0, left), SERVER_SHARE if reported else STARTING_SHARE)
        temporary.remove(folder)
        temporary.release(folder.parent, lock)
    reading.join(READ_SECONDS)
    if not (reported or ending.is_set()):
        pipes.fail(f"vllm serve ended with status {process.returncode}: {output.reason or 'its lines above say why'}")
    sys.exit(0 if ending.is_set() else process.returncode if process.returncode > 0 else 1)


class VllmOutput:
    """Logs the lines that vLLM writes.

    Args:
        ending: set when vLLM is being ended. It then calls the end of its own parts errors; such lines have the level
            debug.

    Attributes:
        reason: the last error that one of them names, and that does not point to an earlier one; warnings name none.
    """

    def __init__(self, ending: threading.Event) -> None:
        self._ending = ending
        self.reason = ""

    def line(self, text: str) -> None:
        """Logs one line. Runs on the reading thread."""
        level, found = level_of(text), _ERROR.search(text)
        if found and level != logging.WARNING and not (self.reason and _ELSEWHERE in found[0]):
            self.reason = found[0]
        vllm_log.log(logging.DEBUG if self._ending.is_set() else level, "%s", text)


def _end_with_this_process() -> None:
    """Has the kernel send SIGTERM to vLLM when this process is killed. Runs in the new process, before vLLM.

    prctl(2), PR_SET_PDEATHSIG goes by the thread that started the process, which is the main thread.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], seconds: float, server_share: float) -> None:
    """Ends vLLM's server, then everything that it has started."""
    deadline = time.monotonic() + seconds
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(server_share * seconds)
    process.kill()
    process.wait()
    end_descendants(ENGINES_SHARE * seconds, deadline)


if __name__ == "__main__":
    main()
