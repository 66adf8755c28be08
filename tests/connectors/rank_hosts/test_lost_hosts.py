"""A host that is lost in the middle of a fetch fails that request, and a slow one fails none."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from embferry import TransferSettings, TransportError
from embferry.connectors.vllm import host_claims, other_hosts
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.host_claims import new_claim

from ..faulty_link import RECEIVE_BYTES, FaultyLink, ports_at
from ..pair import GUARD_S, NBYTES, NOTICES_LOSS_SOON_S, Encode, rows_like, until, with_peer_timeout
from .builders import SECRET, Engine, There
from .host_process import HostProcess

pytestmark = pytest.mark.integration


@contextmanager
def behind_a_link(config: ConnectorConfig, kind: Any) -> Iterator[tuple[Any, FaultyLink]]:
    """Makes host 1 of this ``kind`` behind a link, at loopback addresses that no other test has."""
    listens, advertises = (f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{last}" for last in (2, 3))
    with closing(kind(msgspec.structs.replace(config, host=listens, advertise=advertises))) as host:
        until(lambda: ports_at(listens))
        (port,) = ports_at(listens)
        with closing(FaultyLink(port, advertises, listens)) as link:
            yield host, link


def test_a_connection_that_breaks_on_the_way_is_resumed(
    encode: Encode, engine: Engine, config: ConnectorConfig
) -> None:
    with behind_a_link(config, There) as (there, link):
        link.fault = lambda carried, data: len(link.carried) > 1 or carried < NBYTES // 2
        encode.publish("a")
        shared = engine.fetch("r", "a", encode.offer("a"))
        assert there.has(engine.room(shared), rows_like(0))
        assert len(link.carried) == 2


def test_a_host_that_is_killed_in_the_middle_fails_that_request_and_the_next_one_runs_when_it_is_back(
    encode: Encode, config: ConnectorConfig
) -> None:
    halfway, is_killed = threading.Event(), threading.Event()

    def stop_halfway(carried: int, data: bytearray) -> bool:
        if carried < NBYTES // 2:
            return True
        halfway.set()
        is_killed.wait(GUARD_S)
        return False

    encode.publish("a")
    coordinates = encode.offer("a")
    with closing(Engine(with_peer_timeout(config, NOTICES_LOSS_SOON_S))) as engine:
        with behind_a_link(config, HostProcess) as (host, link):
            link.fault = stop_halfway
            until(lambda: engine.consumer.require("r", "a", coordinates) or halfway.is_set())
            host.kill()
            is_killed.set()
            with pytest.raises(TransportError, match="host 1 of this engine cannot take an embedding") as failed:
                engine.fetch("r", "a", coordinates)
            assert failed.value.retryable
        with closing(There(config)) as back:
            shared = engine.fetch("s", "a", encode.offer("a"))
            assert back.has(engine.room(shared), rows_like(0))


def test_a_host_that_is_back_soon_fails_no_request(encode: Encode, engine: Engine, config: ConnectorConfig) -> None:
    """The scheduler gives the embedding to a claim of the host that is gone, and then to one of the new host."""
    claims = engine.others._hosts[1].claims
    with closing(HostProcess(config)) as gone:
        until(lambda: len(claims) == host_claims.CLAIMS)
        gone.kill()
    encode.publish("a")
    coordinates = encode.offer("a")
    until(lambda: engine.consumer.require("r", "a", coordinates) or len(claims) < host_claims.CLAIMS)
    with closing(There(config)) as back:
        shared = engine.fetch("r", "a", coordinates)
        assert back.has(engine.room(shared), rows_like(0))


def test_a_host_that_comes_and_goes_keeps_no_request_waiting(
    encode: Encode, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_hosts, "CLAIM_S", 0.1)
    encode.publish("a")
    coordinates = encode.offer("a")
    with closing(Engine(config)) as engine:
        until(lambda: engine.others._secret)

        def is_there_after_a_claim() -> bool:
            engine.others._requested(engine.manager, *new_claim(1, SECRET))
            return engine.consumer.require("r", "a", coordinates)

        with pytest.raises(TransportError, match="3 claims of it came to nothing"):
            until(is_there_after_a_claim)


def test_a_link_over_which_an_embedding_takes_longer_than_every_timeout(
    encode: Encode, engine: Engine, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timeouts begin anew with each chunk, of which each takes a few pauses."""
    usual, timeout, pause_s = config.receiving, 3.0, 0.2

    def impatient(self: ConnectorConfig) -> TransferSettings:
        return replace(usual, transfer_timeout=timeout, waiting_timeout=timeout)

    monkeypatch.setattr(ConnectorConfig, "receiving", property(impatient))
    pause = threading.Event()
    with behind_a_link(config, There) as (there, link):
        link.fault = lambda carried, data: not pause.wait(pause_s)
        assert NBYTES / RECEIVE_BYTES * pause_s > timeout
        encode.publish("a")
        shared = engine.fetch("r", "a", encode.offer("a"))
        assert there.has(engine.room(shared), rows_like(0))
