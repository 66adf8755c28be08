"""The end of ``embferry serve --engine vllm``: the router before the instances, in time, without false alarms."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from embferry.serve.config import Settings, VllmSettings
from embferry.serve.supervisor import vllm
from embferry.serve.supervisor.handover import SupervisorPipes
from embferry.serve.supervisor.process import ClusterError
from embferry.serve.supervisor.vllm import INSTANCES_SHARE, VllmCluster
from embferry.serve.supervisor.vllm_child import VllmOutput

LINES = [
    "ERROR 11-29 [async_llm.py:708] AsyncLLM output_handler failed.",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
    "WARNING 11-29 force killing remaining processes",
    "resource_tracker.py:254: UserWarning: There appear to be 1 leaked shared_memory objects to clean up at shutdown",
    "INFO 11-29 Shutting down",
]
WARNING = "(APIServer pid=1) WARNING 11-30 [utils.py:255] This can cause `OSError: [Errno 24] Too many open files`."
POINTERS = [
    "Exception: WorkerProc initialization failed. See stack trace for root cause.",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
]
"""Lines of vLLM that name no reason, but the place of one."""


def test_the_router_ends_before_the_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_command", lambda: "vllm")
    cluster = VllmCluster(Settings(vllm=VllmSettings(encoders=2)), (), progress=print)
    cluster._others = cluster.others()
    sooner, later, share = cluster.ends()
    assert [process.view.name for process in sooner] == ["router"]
    assert {process.view.role for process in later} == {"encode", "language"}
    assert [*sooner, *later] == sorted(cluster.supervised, key=lambda process: process.view.role != "router")
    assert share == INSTANCES_SHARE


def test_without_a_place_for_temporary_files_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_command", lambda: "vllm")
    monkeypatch.setattr(vllm, "adopt_orphans", lambda: None)
    monkeypatch.setattr(vllm.temporary, "new_root", lambda: Path("/dev/null/folder"))
    cluster = VllmCluster(Settings(), (), progress=print)
    with pytest.raises(ClusterError, match="temporary files: /dev/null/folder: Not a directory"), cluster:
        pytest.fail("it was started")
    assert cluster.supervised == []


@pytest.mark.parametrize("line", LINES)
def test_lines_of_an_instance_that_is_being_ended_are_for_debugging(
    line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vllm")
    ending = threading.Event()
    output = VllmOutput(ending)
    output.line(line)
    ending.set()
    output.line(line)
    before, after = caplog.records
    assert before.levelno >= logging.INFO
    assert (after.levelno, after.message) == (logging.DEBUG, line)


def test_a_child_is_told_the_seconds_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    sink = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(os, "dup", lambda fd: reader if fd == 0 else sink)
    monkeypatch.setattr(os, "dup2", lambda fd, to: to)
    pipes = SupervisorPipes()
    os.write(writer, b"first\n")
    assert (pipes.first_line(), pipes.seconds) == (b"first\n", None)
    ended = threading.Event()
    pipes.on_supervisor_end(ended.set)
    os.write(writer, b"5.250\n")
    os.close(writer)
    assert ended.wait(60)
    assert pipes.seconds == 5.25


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["(Worker) ERROR [executor.py:953] ValueError: no memory", *POINTERS], "ValueError: no memory"),
        ([WARNING, *POINTERS], POINTERS[0]),
        (["OSError: no file", "vllm serve: error: argument --dtype"], "error: argument --dtype"),
        (["INFO all is well"], ""),
    ],
)
def test_the_reason_is_the_error_that_others_point_to(lines: list[str], reason: str) -> None:
    output = VllmOutput(threading.Event())
    for line in lines:
        output.line(line)
    assert output.reason == reason
