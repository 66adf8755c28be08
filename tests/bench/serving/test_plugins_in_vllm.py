"""The changes that a comparison makes to vLLM, tried on vLLM's own classes."""

from __future__ import annotations

import importlib

import pytest
import zmq

from embferry.bench.serving import vllm_plugins

pytestmark = pytest.mark.vllm_http


def test_a_reader_sleeps_early_and_looks_regularly(monkeypatch: pytest.MonkeyPatch) -> None:
    shm_broadcast = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    waits: list[int | None] = []
    changed = type(
        "SpinCondition",
        (shm_broadcast.SpinCondition,),
        {"wait": lambda self, timeout_ms=None: waits.append(timeout_ms)},
    )
    monkeypatch.setattr(shm_broadcast, "SpinCondition", changed)
    vllm_plugins.idle_workers()
    vllm_plugins.idle_workers()  # vLLM may call it again
    context = zmq.Context()
    try:
        writer = changed(False, context, "inproc://notes")
        reader = changed(True, context, "inproc://notes")
        assert (writer.busy_loop_s, reader.busy_loop_s) == (0, vllm_plugins.SPIN_S)
        for asked in (None, 60_000, 1):
            reader.wait(asked)
        assert waits == [vllm_plugins.LOOK_MS, vllm_plugins.LOOK_MS, 1]
    finally:
        context.destroy(linger=0)
