"""``python -m embferry.serve.vllm.child``: one ``vllm serve``, started by the supervisor, not by hand.

It stands between the two because vLLM does not end with its parent: here, standard input ends when the supervisor does,
however that came about, and everything that vLLM has started is ended then. Standard input brings the command in one
line; standard output carries one line, when vLLM answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from embferry.serve.supervisor.handover import read_line

PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 0.25
PROBE_SECONDS = 5.0
END_SECONDS, LEFT_SECONDS = 6.0, 3.0
"""Seconds vLLM gets for an orderly end, and its engines after it; then what is left of its process group is killed."""


def main() -> None:
    control, status = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    try:
        told: dict[str, Any] = json.loads(read_line(control))
    except EOFError:
        sys.exit(1)
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    process = subprocess.Popen(
        told["command"],
        stdin=subprocess.DEVNULL,
        env=os.environ | told["environ"],
        process_group=0,
        preexec_fn=_end_with_this_process,
    )
    threading.Thread(target=_end_with_parent, args=(control, ending), name="parent", daemon=True).start()
    try:
        reported = False
        while process.poll() is None and not ending.wait(LOOK_SECONDS):
            if not reported and _answers(told["url"]):
                os.write(status, json.dumps({"url": told["url"]}).encode() + b"\n")
                reported = True
    finally:
        _end(process)
    sys.exit(0 if ending.is_set() else process.returncode if process.returncode > 0 else 1)


def _end_with_this_process() -> None:
    """In vLLM's process, before it is that: SIGTERM if this one is killed (prctl(2), PR_SET_PDEATHSIG; it goes by the
    thread that started it, which is the main one).
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_with_parent(control: int, ending: threading.Event) -> None:
    while os.read(control, 1):
        pass
    ending.set()


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """vLLM, then the engines it has started, then what is left: all of its process group. Python's resource tracker is
    there too; it removes the shared memory of those that were killed, and so goes last.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    process.kill()
    process.wait()
    deadline = time.monotonic() + LEFT_SECONDS
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(LOOK_SECONDS / 5)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
