"""Each embedding travels once to the other host, whose ranks map it, and is dropped there with the scheduler's."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embferry.connectors.shared.shared_rows import SharedRows
from embferry.connectors.vllm import host_claims
from embferry.connectors.vllm.channel import Map
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.other_hosts import Dropped
from embferry.connectors.vllm.pending_loads import PendingLoads
from embferry.trust.trust import TLS_ENV, TLS_REQUIRED_ENV
from tests.trust.authority import Authority

from ..pair import GUARD_S, SHAPE, Encode, rows_like, until
from .builders import Engine, There

pytestmark = pytest.mark.integration


def test_every_rank_on_every_host_maps_the_embedding(encode: Encode, engine: Engine, there: There) -> None:
    for seed, name in enumerate("abc"):
        encode.publish(name, seed)
        shared = engine.fetch(f"request {name}", name, encode.offer(name))
        assert np.array_equal(engine.ranks[0].find(shared.key).rows, rows_like(seed))
        assert there.has(engine.room(shared), rows_like(seed))
    assert engine.counters.read()["transfers", "success"] == 3


def test_embeddings_cross_over_tls(config: ConnectorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in zip(TLS_ENV, Authority.make(tmp_path).files("part"), strict=True):
        monkeypatch.setenv(name, str(file))
    monkeypatch.setenv(TLS_REQUIRED_ENV, "1")
    with closing(Encode(config)) as encode, closing(Engine(config)) as engine, closing(There(config)) as there:
        encode.publish("a")
        shared = engine.fetch("r", "a", encode.offer("a"))
        assert there.has(engine.room(shared), rows_like(0))
        assert engine.manager.endpoint.startswith("tls://")


def test_more_embeddings_than_claims(encode: Encode, engine: Engine, there: There) -> None:
    names = [str(number) for number in range(2 * host_claims.CLAIMS)]
    for seed, name in enumerate(names):
        encode.publish(name, seed)
    coordinates = {name: encode.offer(name) for name in names}
    for name in names:
        engine.consumer.require("r", name, coordinates[name])
    for seed, name in enumerate(names):
        shared = engine.fetch("r", name, coordinates[name])
        assert there.has(engine.room(shared), rows_like(seed))


def test_a_request_does_not_run_before_the_other_host_has_the_embedding(
    encode: Encode, engine: Engine, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode.publish("a")
    coordinates, rank = encode.offer("a"), there.ranks[1]
    may_map, mapped = threading.Event(), rank._map

    def slow(packet: Map, fd: int) -> None:
        may_map.wait(GUARD_S)
        mapped(packet, fd)

    monkeypatch.setattr(rank, "_map", slow)
    until(lambda: engine.consumer.require("r", "a", coordinates) or engine.consumer.find("a") is not None)
    until(lambda: engine.consumer.require("r", "a", coordinates) or engine.others._sendings)
    assert not engine.consumer.require("r", "a", coordinates)
    may_map.set()
    engine.fetch("r", "a", coordinates)


def test_memory_there_is_freed_when_every_rank_there_has_loaded_it(
    encode: Encode, engine: Engine, there: There
) -> None:
    """The ranks of the other host may be some steps behind those beside the scheduler."""
    encode.publish("a")
    shared = engine.fetch("r", "a", encode.offer("a"))
    room, loads = engine.room(shared), PendingLoads()
    loads.add("a", shared, (room,))
    (load,) = loads.for_step(())
    assert (load.rooms, load.shape) == ((room,), SHAPE)
    engine.ranks[0].find(shared.key).completed[0] = load.number
    assert loads.for_step(()) == ()
    engine.consumer.release("r")
    engine.consumer._drop("a", "")
    dropped = engine.workers.dropped(repeat=True)
    assert dropped == (Dropped(room, load.number),)
    assert engine.workers.dropped(repeat=False) == dropped
    assert engine.workers.dropped(repeat=False) == ()
    there.load(0, room, load.number)
    there.receiver.drop(dropped)
    assert there.has(room, rows_like(0))
    there.load(1, room, load.number)
    there.receiver.drop(())
    until(lambda: there.kept == 0 and all(not rank._mapped for rank in there.ranks))
    there.receiver.drop(dropped)  # a step may be repeated
    until(lambda: len(there.receiver._incoming) == host_claims.CLAIMS)  # the next claim is made on another thread


def test_an_embedding_that_no_request_needs_any_more_is_dropped_there(
    encode: Encode, engine: Engine, there: There
) -> None:
    encode.publish("a")
    engine.fetch("r", "a", encode.offer("a"))
    engine.consumer.release("r")
    engine.consumer._drop("a", "")
    there.receiver.drop(engine.workers.dropped(repeat=False))
    until(lambda: there.kept == 0 and all(not rank._mapped for rank in there.ranks))


def test_a_load_names_the_memory_of_each_host() -> None:
    loads: Any = PendingLoads()
    with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
        loads.add("a", shared, (7, 9))
        (load,) = loads.for_step(["a"])
        assert (load.key, load.rooms, load.wanted) == (shared.key, (7, 9), False)
