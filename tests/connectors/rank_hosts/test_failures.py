"""An embedding that another host cannot take fails the requests that need it, and no other."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import closing

import pytest

from embferry import LocalProtocolError, TransportError
from embferry.connectors.vllm import host_claims, host_receiver, other_hosts
from embferry.connectors.vllm.channel import Map
from embferry.connectors.vllm.config import ConnectorConfig

from ..pair import GUARD_S, NOTICES_LOSS_SOON_S, Encode, rows_like, until, with_peer_timeout
from ..test_failed_managers import break_manager
from .builders import Engine, There

pytestmark = pytest.mark.integration


def test_an_embedding_that_a_rank_there_cannot_map_fails_the_request_alone(
    encode: Encode, engine: Engine, there: There, monkeypatch: pytest.MonkeyPatch
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


def test_a_rank_there_that_has_ended_fails_requests_at_once(encode: Encode, engine: Engine, there: There) -> None:
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
    hasty = with_peer_timeout(config, NOTICES_LOSS_SOON_S)
    encode.publish("a")
    with closing(Engine(hasty)) as engine:
        with closing(There(config)):
            engine.fetch("r", "a", encode.offer("a"))
        monkeypatch.setattr(other_hosts, "HOST_S", 0.5)
        encode.publish("b", 1)
        with pytest.raises(TransportError, match="host 1 of this engine"):
            engine.fetch("s", "b", encode.offer("b"))
        monkeypatch.undo()
        with closing(There(config)) as back:
            shared = engine.fetch("t", "b", encode.offer("b"))
            assert back.has(engine.room(shared), rows_like(1))


def test_a_transfer_that_could_not_begin_drops_nothing_there(
    encode: Encode, engine: Engine, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(room: int) -> None:
        raise LocalProtocolError("the room is in use; draw another", room=room)

    encode.publish("a")
    monkeypatch.setattr(engine.manager, "open", refused)
    with pytest.raises(TransportError, match="the room is in use"):
        engine.fetch("r", "a", encode.offer("a"))
    assert engine.workers.dropped(repeat=False) == ()


def test_a_manager_that_has_failed_is_replaced_at_the_same_port(
    encode: Encode, engine: Engine, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_hosts, "HOST_S", GUARD_S)
    encode.publish("a")
    engine.fetch("r", "a", encode.offer("a"))
    failed = engine.manager
    break_manager(failed)
    encode.publish("b", 1)
    shared = engine.fetch("s", "b", encode.offer("b"))
    assert there.has(engine.room(shared), rows_like(1))
    assert engine.manager is not failed


def test_a_host_s_manager_that_has_failed_is_replaced(encode: Encode, engine: Engine, there: There) -> None:
    encode.publish("a")
    room = engine.room(engine.fetch("r", "a", encode.offer("a")))
    failed = there.receiver._managers.get(there.receiver._layout)
    before = set(there.receiver._incoming)
    break_manager(failed)
    until(lambda: len(set(there.receiver._incoming) - before) == host_claims.CLAIMS)
    encode.publish("b", 1)
    shared = engine.fetch("s", "b", encode.offer("b"))
    assert there.has(engine.room(shared), rows_like(1))
    assert there.has(room, rows_like(0))


def test_a_host_ends_while_a_rank_does_not_map(
    encode: Encode, engine: Engine, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_map = threading.Event()
    there = There(config)
    monkeypatch.setattr(there.ranks[0], "_map", lambda packet, fd: (may_map.wait(GUARD_S), os.close(fd)))
    encode.publish("a")
    coordinates = encode.offer("a")
    until(lambda: engine.consumer.require("r", "a", coordinates) or there.receiver.workers._sharings)
    there.receiver.close()
    may_map.set()
    there.close()
    assert host_receiver.MAP_S < GUARD_S
