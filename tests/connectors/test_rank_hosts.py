"""Ranks of one engine on two hosts: the second host receives each embedding once more, and its ranks map it.

Both hosts are in this process here. Their ranks differ in nothing else: they share no memory and no socket.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import LocalProtocolError, TransportError
from embferry.connectors.shared.counters import Counters
from embferry.connectors.shared.shape import Shape
from embferry.connectors.shared.shared_rows import ByteRows, SharedRows
from embferry.connectors.vllm import host_claims, host_receiver, other_hosts
from embferry.connectors.vllm.channel import Map
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.consumer import Consumer
from embferry.connectors.vllm.coordinates import Coordinates
from embferry.connectors.vllm.host_receiver import HostReceiver
from embferry.connectors.vllm.other_hosts import Dropped, OtherHosts
from embferry.connectors.vllm.pending_loads import PendingLoads
from embferry.connectors.vllm.placement import Placement
from embferry.connectors.vllm.rank_memory import RankMemory
from embferry.connectors.vllm.workers import Workers
from embferry.trust.keys import Key

from .faulty_link import ADVERTISES, LISTENS, FaultyLink, ports_at
from .pair import CONFIG, GUARD_S, SHAPE, Encode, free_port, rows_like, until

pytestmark = pytest.mark.integration

HIDDEN = SHAPE.width // 2
"""The model is half as wide as a token of the embedding, as with deepstack."""
HERE, THERE = 1, 2
"""Ranks on the two hosts."""


class OtherHost:
    """Host 1, with ranks of the engine."""

    def __init__(self, config: ConnectorConfig, port: int) -> None:
        name = uuid.uuid4().hex
        self.receiver = HostReceiver(config, name, THERE, 1, f"tcp://127.0.0.1:{port}", HIDDEN, SHAPE.dtype)
        self.ranks = [RankMemory(name, rank) for rank in range(THERE)]

    @property
    def kept(self) -> int:
        """The number of embeddings whose memory it keeps."""
        return sum(each.shared is not None for each in list(self.receiver._incoming.values()))

    def load(self, rank: int, room: int, number: int) -> None:
        """Records a load, as a rank does."""
        self.ranks[rank].find(room).completed[rank] = number

    def close(self) -> None:
        self.receiver.close()
        for rank in self.ranks:
            rank.close()


class Engine:
    """A consumer with the ranks of host 0."""

    def __init__(self, config: ConnectorConfig) -> None:
        self.counters, name = Counters(), uuid.uuid4().hex
        self.others = OtherHosts(config, 2, HIDDEN, SHAPE.dtype, self.counters)
        self.workers = Workers(name, HERE, self.others)
        self.consumer = Consumer(config, self.counters, None, self.workers)
        self.ranks = [RankMemory(name, rank) for rank in range(HERE)]

    def fetch(self, request: str, mm_hash: str, coordinates: Coordinates) -> SharedRows:
        until(lambda: self.consumer.require(request, mm_hash, coordinates))
        shared = self.consumer.find(mm_hash)
        assert shared is not None
        return shared

    def room(self, shared: SharedRows) -> int:
        (room,) = self.workers.rooms(shared)
        return room

    def close(self) -> None:
        self.consumer.close()
        self.workers.close()
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def config() -> ConnectorConfig:
    return msgspec.structs.replace(CONFIG, transports=("tcp",), ranks_port=free_port())


@pytest.fixture
def encode() -> Iterator[Encode]:
    with closing(Encode(msgspec.structs.replace(CONFIG, transports=("tcp",)))) as made:
        yield made


@pytest.fixture
def engine(config: ConnectorConfig) -> Iterator[Engine]:
    with closing(Engine(config)) as made:
        yield made


@pytest.fixture
def there(config: ConnectorConfig, engine: Engine) -> Iterator[OtherHost]:
    assert config.ranks_port is not None
    with closing(OtherHost(config, config.ranks_port)) as made:
        yield made


def as_rows(shared: SharedRows) -> ByteRows:
    """Returns the rows of memory on the other host as those of the embedding."""
    assert shared.shape == Shape(2 * SHAPE.tokens, HIDDEN, SHAPE.dtype)
    return shared.rows.reshape(SHAPE.tokens, SHAPE.token_bytes)


def test_every_rank_on_every_host_maps_the_embedding(encode: Encode, engine: Engine, there: OtherHost) -> None:
    for seed, name in enumerate("abc"):
        encode.publish(name, seed)
        shared = engine.fetch(f"request {name}", name, encode.offer(name))
        assert np.array_equal(engine.ranks[0].find(shared.key).rows, rows_like(seed))
        for rank in there.ranks:
            assert np.array_equal(as_rows(rank.find(engine.room(shared))), rows_like(seed))
    assert engine.counters.read()["transfers", "success"] == 3


def test_more_embeddings_than_claims(encode: Encode, engine: Engine, there: OtherHost) -> None:
    names = [str(number) for number in range(2 * host_claims.CLAIMS)]
    for seed, name in enumerate(names):
        encode.publish(name, seed)
    coordinates = {name: encode.offer(name) for name in names}
    for name in names:
        engine.consumer.require("r", name, coordinates[name])
    for seed, name in enumerate(names):
        shared = engine.fetch("r", name, coordinates[name])
        assert np.array_equal(as_rows(there.ranks[1].find(engine.room(shared))), rows_like(seed))


def test_a_request_does_not_run_before_the_other_host_has_the_embedding(
    encode: Encode, engine: Engine, there: OtherHost, monkeypatch: pytest.MonkeyPatch
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


def test_an_embedding_that_a_rank_there_cannot_map_fails_the_request_alone(
    encode: Encode, engine: Engine, there: OtherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(packet: Map, fd: int) -> None:
        os.close(fd)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    encode.publish("a")
    monkeypatch.setattr(there.ranks[1], "_map", exhausted)
    with pytest.raises(TransportError, match=r"host 1 of this engine cannot take .*Cannot allocate memory") as failed:
        engine.fetch("r", "a", encode.offer("a"))
    assert failed.value.retryable
    engine.consumer.release("r")
    monkeypatch.undo()
    engine.fetch("s", "a", encode.offer("a"))
    until(lambda: there.kept == 1)


def test_a_rank_there_that_has_ended_fails_requests_at_once(encode: Encode, engine: Engine, there: OtherHost) -> None:
    until(lambda: any(one.rank == 1 for one in there.receiver.workers._connections))
    there.ranks[1].close()
    until(lambda: not any(one.rank == 1 for one in there.receiver.workers._connections))
    encode.publish("a")
    with pytest.raises(TransportError, match=r"host 1 .*rank 1 of this engine is gone"):
        engine.fetch("r", "a", encode.offer("a"))


def test_a_host_that_never_asks_fails_the_request_and_is_named(
    encode: Encode, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_hosts, "HOST_S", 0.01)
    encode.publish("a")
    with pytest.raises(TransportError, match="host 1 of this engine has asked for no embedding") as failed:
        engine.fetch("r", "a", encode.offer("a"))
    assert failed.value.retryable


def test_a_host_that_dies_fails_the_request_and_the_next_one_runs_when_it_is_back(
    encode: Encode, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(config, peer_timeout=0.5)
    assert config.ranks_port is not None
    encode.publish("a")
    with closing(Engine(config)) as engine:
        with closing(OtherHost(config, config.ranks_port)):
            engine.fetch("r", "a", encode.offer("a"))
        monkeypatch.setattr(other_hosts, "HOST_S", 0.5)
        encode.publish("b", 1)
        with pytest.raises(TransportError, match="host 1 of this engine"):
            engine.fetch("s", "b", encode.offer("b"))
        monkeypatch.undo()
        with closing(OtherHost(config, config.ranks_port)) as back:
            shared = engine.fetch("t", "b", encode.offer("b"))
            assert np.array_equal(as_rows(back.ranks[0].find(engine.room(shared))), rows_like(1))


def test_a_connection_that_breaks_on_the_way_is_resumed(
    encode: Encode, engine: Engine, config: ConnectorConfig
) -> None:
    assert config.ranks_port is not None
    faulty, before = msgspec.structs.replace(config, host=LISTENS, advertise=ADVERTISES), ports_at(LISTENS)
    with closing(OtherHost(faulty, config.ranks_port)) as there:
        until(lambda: ports_at(LISTENS) - before)
        (port,) = ports_at(LISTENS) - before
        with closing(FaultyLink(port)) as link:
            link.fault = lambda carried, data: len(link.carried) > 1 or carried < SHAPE.nbytes // 2
            encode.publish("a")
            shared = engine.fetch("r", "a", encode.offer("a"))
            assert np.array_equal(as_rows(there.ranks[0].find(engine.room(shared))), rows_like(0))
            assert len(link.carried) == 2


def test_memory_there_is_freed_when_every_rank_there_has_loaded_it(
    encode: Encode, engine: Engine, there: OtherHost
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
    assert np.array_equal(as_rows(there.ranks[1].find(room)), rows_like(0))
    there.load(1, room, load.number)
    there.receiver.drop(())
    until(lambda: there.kept == 0 and all(not rank._mapped for rank in there.ranks))
    there.receiver.drop(dropped)  # a step may be repeated
    assert len(there.receiver._incoming) == host_claims.CLAIMS


def test_an_embedding_that_no_request_needs_any_more_is_dropped_there(
    encode: Encode, engine: Engine, there: OtherHost
) -> None:
    encode.publish("a")
    engine.fetch("r", "a", encode.offer("a"))
    engine.consumer.release("r")
    engine.consumer._drop("a", "")
    there.receiver.drop(engine.workers.dropped(repeat=False))
    until(lambda: there.kept == 0 and all(not rank._mapped for rank in there.ranks))


def test_a_host_without_the_cluster_key_gets_nothing(
    encode: Encode, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.ranks_port is not None
    monkeypatch.setattr(other_hosts, "HOST_S", 0.5)
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    with closing(Engine(config)) as engine:
        monkeypatch.delenv("EMBFERRY_CLUSTER_KEY")
        with closing(OtherHost(config, config.ranks_port)) as there:
            encode.publish("a")
            with pytest.raises(TransportError, match="host 1 of this engine has asked for no embedding"):
                engine.fetch("r", "a", encode.offer("a"))
            assert there.kept == 0


def test_a_claim_that_is_reported_again_after_its_use_is_not_served_twice(
    encode: Encode, engine: Engine, there: OtherHost
) -> None:
    """A report may be under way while the claim is taken."""
    encode.publish("a")
    room = engine.room(engine.fetch("r", "a", encode.offer("a")))
    for _ in range(2):
        engine.others._requested(engine.others._managers.get(engine.others._layout), room, host_claims.new_name(1))
    encode.publish("b", 1)
    assert engine.room(engine.fetch("s", "b", encode.offer("b"))) != room
    assert np.array_equal(as_rows(there.ranks[0].find(room)), rows_like(0))


def test_a_transfer_that_could_not_begin_drops_nothing_there(
    encode: Encode, engine: Engine, there: OtherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(room: int) -> None:
        raise LocalProtocolError("the room is in use; draw another", room=room)

    encode.publish("a")
    manager = engine.others._managers.get(engine.others._layout)
    monkeypatch.setattr(manager, "open", refused)
    with pytest.raises(TransportError, match="the room is in use"):
        engine.fetch("r", "a", encode.offer("a"))
    assert engine.workers.dropped(repeat=False) == ()


def test_a_claim_of_a_stranger_is_not_served(encode: Encode, engine: Engine, there: OtherHost) -> None:
    for name in ("vllm-host-2-0123456789abcdef", "vllm-host-0-0123456789abcdef", "vllm-1", "vllm-host-1"):
        engine.others._requested(engine.others._managers.get(engine.others._layout), 1, name)
    assert all(1 not in host.claims for host in engine.others._hosts.values())


@pytest.mark.parametrize(
    ("ranks", "per_host", "here"),
    [(1, 1, [1]), (2, 2, [2]), (4, 4, [4]), (2, 1, [1, 1]), (4, 2, [2, 2]), (2, 4, [2]), (4, 3, [3, 1])],
)
def test_placement(ranks: int, per_host: int, here: list[int]) -> None:
    placements = [Placement(ranks, per_host, host, "10.0.0.1") for host in range(len(here) + 1)]
    assert [each.ranks_here for each in placements] == [*here, 0]
    assert {each.hosts for each in placements} == {len(here)}


@pytest.mark.parametrize(("port", "replicas", "why"), [(None, 1, "ranks_port"), (5000, 2, "data_parallel_size is 2")])
def test_settings_with_which_embeddings_reach_no_other_host_end_the_start(
    port: int | None, replicas: int, why: str
) -> None:
    Placement(2, 2, 0, "10.0.0.1").check(port, replicas)
    with pytest.raises(ValueError, match=why):
        Placement(2, 1, 0, "10.0.0.1").check(port, replicas)


def test_a_host_ends_while_a_rank_does_not_map(
    encode: Encode, engine: Engine, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.ranks_port is not None
    may_map = threading.Event()
    there = OtherHost(config, config.ranks_port)
    monkeypatch.setattr(there.ranks[0], "_map", lambda packet, fd: (may_map.wait(GUARD_S), os.close(fd)))
    encode.publish("a")
    coordinates = encode.offer("a")
    until(lambda: engine.consumer.require("r", "a", coordinates) or there.receiver.workers._sharings)
    there.receiver.close()
    may_map.set()
    there.close()
    assert host_receiver.MAP_S < GUARD_S


def test_a_load_names_the_memory_of_each_host() -> None:
    loads: Any = PendingLoads()
    with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
        loads.add("a", shared, (7, 9))
        (load,) = loads.for_step(["a"])
        assert (load.key, load.rooms, load.wanted) == (shared.key, (7, 9), False)
