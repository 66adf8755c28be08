"""The changes that a comparison makes to vLLM, against vLLM's own classes."""

from __future__ import annotations

import importlib

import pytest
import zmq

from embferry.bench.serving import idle_workers

pytestmark = pytest.mark.vllm_http


def test_a_reader_sleeps_early_and_misses_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shm_broadcast = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    waits: list[int | None] = []
    changed = type(
        "SpinCondition",
        (shm_broadcast.SpinCondition,),
        {"wait": lambda self, timeout_ms=None: waits.append(timeout_ms)},
    )
    monkeypatch.setattr(shm_broadcast, "SpinCondition", changed)
    idle_workers.register()
    idle_workers.register()  # vLLM may call it again
    context = zmq.Context()
    try:
        writer = changed(False, context, "inproc://notes")
        reader = changed(True, context, "inproc://notes")
        assert (writer.busy_loop_s, reader.busy_loop_s) == (0, idle_workers.SPIN_S)
        for asked in (None, 60_000, 1):
            reader.wait(asked)
        assert waits == [idle_workers.LOOK_MS, idle_workers.LOOK_MS, 1]
    finally:
        context.destroy(linger=0)
