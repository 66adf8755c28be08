"""The changes that a comparison makes to vLLM, against vLLM's own classes."""

from __future__ import annotations

import importlib

import pytest
import zmq

from embferry.bench.serving import idle_workers

pytestmark = pytest.mark.vllm_http


def test_a_reader_rests_early_once_it_has_been_there_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shm_broadcast = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
    changed = type("SpinCondition", (shm_broadcast.SpinCondition,), {})
    monkeypatch.setattr(shm_broadcast, "SpinCondition", changed)
    idle_workers.register()
    idle_workers.register()  # vLLM may call it again
    context = zmq.Context()
    try:
        writer = changed(False, context, "inproc://notes")
        reader = changed(True, context, "inproc://notes")
        reader.record_read()
        assert reader.busy_loop_s == 1, "vLLM's own, while the two may not know each other yet"
        reader.made_at -= idle_workers.STARTED_S
        reader.record_read()
        assert reader.busy_loop_s == idle_workers.SPIN_S
        writer.notify()
        reader.last_read -= 1
        reader.wait(timeout_ms=5000)
    finally:
        context.destroy(linger=0)
