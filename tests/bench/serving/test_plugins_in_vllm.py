"""The changes that a comparison makes to vLLM, tried on vLLM's own classes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import zmq

from embferry.bench.serving import corruption, vllm_plugins

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which vLLM imports
def test_a_file_of_the_example_connector_loses_its_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = importlib.import_module("torch")
    load_file = importlib.import_module("safetensors.torch").load_file
    module = importlib.import_module("vllm.distributed.ec_transfer.ec_connector.example_connector")
    connector = module.ECExampleConnector
    monkeypatch.setattr(connector, "save_caches", connector.save_caches)
    monkeypatch.setenv(corruption.VARIABLE, str(tmp_path / "damage"))
    corruption.zeroed_tails()
    encoder = object.__new__(connector)
    encoder._is_producer, encoder._storage_path = True, str(tmp_path)
    cache = {"hash": torch.ones(1000, 256)}
    encoder.save_caches(cache, "hash")
    (file,) = tmp_path.glob("hash/*")
    assert load_file(file)["ec_cache"].all()
    (tmp_path / "damage").touch()
    encoder.save_caches(cache, "hash")
    damaged = load_file(file)["ec_cache"]
    assert damaged[:740].all()
    assert not damaged[760:].any()
