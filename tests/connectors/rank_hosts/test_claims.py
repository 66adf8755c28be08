"""Claims of hosts, the secret by which the scheduler knows them, and settings without which none can be made."""

from __future__ import annotations

from contextlib import closing

import pytest

from embferry import TransportError
from embferry.connectors.vllm import host_claims, other_hosts
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.host_claims import HostClaim, host_of, new_claim
from embferry.connectors.vllm.placement import Placement
from embferry.trust.keys import Key

from ..pair import Encode, rows_like, until
from .builders import SECRET, Engine, There

pytestmark = pytest.mark.integration


def test_a_host_without_the_cluster_key_gets_nothing(
    encode: Encode, config: ConnectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_hosts, "HOST_S", 0.5)
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    with closing(Engine(config)) as engine:
        monkeypatch.delenv("EMBFERRY_CLUSTER_KEY")
        with closing(There(config)) as there:
            encode.publish("a")
            with pytest.raises(TransportError, match="host 1 of this engine has asked for no embedding"):
                engine.fetch("r", "a", encode.offer("a"))
            assert there.kept == 0


def test_a_claim_that_is_reported_again_after_its_use_is_not_served_twice(
    encode: Encode, engine: Engine, there: There
) -> None:
    """A report may be under way while the claim is taken."""
    encode.publish("a")
    room = engine.room(engine.fetch("r", "a", encode.offer("a")))
    for _ in range(2):
        engine.others._requested(engine.manager, room, f"vllm-host-1-{host_claims._proof(1, room, SECRET)}")
    encode.publish("b", 1)
    assert engine.room(engine.fetch("s", "b", encode.offer("b"))) != room
    assert there.has(room, rows_like(0))


def test_a_claim_tells_its_host_to_who_knows_the_secret() -> None:
    claim, other = new_claim(3, SECRET), new_claim(3, SECRET)
    assert host_of(claim, SECRET) == 3
    assert claim.room not in (0, other.room)
    forged = {
        "another secret": (claim, host_claims.new_secret()),
        "another room": (HostClaim(other.room, claim.name), SECRET),
        "another host": (HostClaim(claim.room, claim.name.replace("host-3", "host-1")), SECRET),
        "host 0": (HostClaim(claim.room, f"vllm-host-0-{host_claims._proof(0, claim.room, SECRET)}"), SECRET),
        "no proof": (HostClaim(claim.room, "vllm-host-3-"), SECRET),
        "half a proof": (HostClaim(claim.room, claim.name[:-32]), SECRET),
        "more than a proof": (HostClaim(claim.room, claim.name + "\n"), SECRET),
        "a consumer": (HostClaim(claim.room, "vllm-0123456789abcdef-0123456789abcdef"), SECRET),
    }
    assert {why: host_of(*given) for why, given in forged.items()} == dict.fromkeys(forged)


def test_a_host_of_another_start_of_the_engine_gets_nothing(
    encode: Encode, engine: Engine, config: ConnectorConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ranks may run on when the scheduler is started again. They would keep what the new ranks are to load."""
    with closing(There(config, host_claims.new_secret())) as stale:
        until(lambda: "it belongs to another engine, or to an earlier start of this one" in caplog.text)
        with closing(There(config)) as there:
            for name in map(str, range(2 * host_claims.CLAIMS)):
                encode.publish(name)
                there.ranks[0].find(engine.room(engine.fetch(name, name, encode.offer(name))))
        assert stale.kept == 0
    assert caplog.text.count("it belongs to another engine") == 1


def test_a_host_that_the_engine_does_not_have_gets_nothing(engine: Engine) -> None:
    until(lambda: engine.others._secret)
    engine.others._requested(engine.manager, *new_claim(2, SECRET))
    assert all(not host.claims for host in engine.others._hosts.values())


def test_claims_that_the_scheduler_has_forgotten_are_served_once_they_are_repeated(
    encode: Encode, engine: Engine, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stood still for a while finds them all too old."""
    until(lambda: len(engine.others._hosts[1].claims) == host_claims.CLAIMS)
    encode.publish("a")
    coordinates = encode.offer("a")
    with monkeypatch.context() as still:
        still.setattr(other_hosts, "CLAIM_S", -1.0)
        until(lambda: engine.consumer.require("r", "a", coordinates) or engine.others._sendings)
        until(lambda: not engine.others._hosts[1].claims)  # some are repeated meanwhile, and forgotten again
    engine.fetch("r", "a", coordinates)


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
    Placement(2, 2, 0, "10.0.0.1").check("10.0.0.1", port, replicas)
    with pytest.raises(ValueError, match=why):
        Placement(2, 1, 0, "10.0.0.1").check("10.0.0.1", port, replicas)


def test_the_scheduler_s_host_must_listen_where_others_reach_it() -> None:
    for address in ("127.0.0.1", "localhost"):
        Placement(2, 1, 0, address).check("127.0.0.1", 5000, 1)
    Placement(2, 2, 0, "10.0.0.1").check("127.0.0.1", 5000, 1)
    with pytest.raises(ValueError, match=r"no other host reaches the host 127\.0\.0\.1"):
        Placement(2, 1, 0, "10.0.0.1").check("127.0.0.1", 5000, 1)
