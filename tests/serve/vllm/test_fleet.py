"""Whose turn it is."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from embferry.serve.config import RouterSettings, Settings, VllmSettings
from embferry.serve.vllm.fleet import MAX_MISSES, Fleet, Instance
from embferry.serve.vllm.metrics import VllmRouterMetrics
from tests.serve.vllm.stubs import Network, Stub, picture, request, routed

pytestmark = pytest.mark.asyncio


async def fleet_of(*stubs: Stub, **vllm: object) -> Fleet:
    """One that has looked once."""
    urls = {f"{role}_urls": tuple(s.url for s in stubs if s.role == role) for role in ("encode", "language")}
    settings = Settings(router=RouterSettings(engine="vllm"), vllm=VllmSettings.model_validate({**urls, **vllm}))
    fleet = Fleet(settings, httpx.AsyncClient(transport=Network(*stubs)), VllmRouterMetrics())
    await asyncio.gather(*(fleet._probe(instance) for instance in fleet.instances))
    return fleet


async def home(fleet: Fleet, uuid: str) -> Instance:
    found = await fleet.encoder(uuid, "tiny", (), ())
    assert found is not None
    return found


def encoders(count: int) -> list[Stub]:
    return [Stub(f"enc{number}", "encode") for number in range(count)]


async def test_a_content_has_its_encoder_and_all_have_some() -> None:
    fleet = await fleet_of(*encoders(4))
    names = [f"item {number}" for number in range(400)]
    homes = {name: (await home(fleet, name)).url for name in names}
    assert {name: (await home(fleet, name)).url for name in names} == homes
    assert min(Counter(homes.values()).values()) > 60
    fewer = await fleet_of(*encoders(3))
    moved = [name for name in names if (await home(fewer, name)).url != homes[name]]
    assert {homes[name] for name in moved} == {"http://enc3"}  # only what was at the one that has gone


async def test_much_more_loaded_is_not_home() -> None:
    fleet = await fleet_of(*encoders(2), affinity_slack=2)
    mine = await home(fleet, "x")
    (other,) = (one for one in fleet.encoders if one is not mine)
    with fleet.in_hand(mine), fleet.in_hand(mine):
        assert await home(fleet, "x") is mine
        with fleet.in_hand(mine):
            assert await home(fleet, "x") is other
            with fleet.in_hand(other):
                assert await home(fleet, "x") is mine
    assert mine.in_hand == other.in_hand == 0


async def test_the_least_loaded_language_instance_by_turns() -> None:
    fleet = await fleet_of(*(Stub(f"lang{number}", "language") for number in range(3)))
    seen = []
    for _ in range(6):
        one = await fleet.language("tiny", ())
        assert one is not None
        with fleet.in_hand(one):
            other = await fleet.language(None, ())
            assert other is not None
            assert other is not one
        seen.append(one.url)
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


async def test_who_has_been_tried_is_not_asked_again_and_who_is_avoided_comes_last() -> None:
    fleet = await fleet_of(*encoders(2))
    mine = await home(fleet, "x")
    (other,) = (one for one in fleet.encoders if one is not mine)
    assert await fleet.encoder("x", None, {mine.life}, ()) is other
    assert await fleet.encoder("x", None, (), {mine.url}) is other
    assert await fleet.encoder("x", None, {other.life}, {mine.url}) is mine
    assert await fleet.encoder("x", None, {mine.life, other.life}, ()) is None


async def test_a_restart_is_another_life() -> None:
    (stub,) = encoders(1)
    fleet = await fleet_of(stub)
    (instance,) = fleet.encoders
    life = instance.life
    instance.remember("x")
    stub.up = False
    await fleet._probe(instance)
    assert not instance.up
    assert await fleet.encoder("x", None, (), ()) is None
    stub.up = True
    assert await fleet.encoder("x", None, {life}, ()) is instance
    assert "x" not in instance.encoded


async def test_a_busy_instance_is_not_gone_at_once() -> None:
    class Slow(Network):
        async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
            if slow:
                raise httpx.ReadTimeout("slow", request=asked)
            return await super().handle_async_request(asked)

    slow = False
    (stub,) = encoders(1)
    settings = Settings(vllm=VllmSettings(encode_urls=(stub.url,)))
    fleet = Fleet(settings, httpx.AsyncClient(transport=Slow(stub)), VllmRouterMetrics())
    (instance,) = fleet.encoders
    await fleet._probe(instance)
    slow = True
    for _ in range(MAX_MISSES):
        assert instance.up
        await fleet._probe(instance)
    assert not instance.up
    slow = False
    await fleet._probe(instance)
    assert instance.up


@pytest.mark.parametrize("health", [503, 500, 404])
async def test_an_engine_that_has_died_is_gone(health: int) -> None:
    encoder, language = Stub("enc", "encode"), Stub("lang", "language")
    async with routed(encoder, language) as router:
        encoder.health = health
        async with asyncio.timeout(5):
            while (await router.get("/ready")).status == 200:
                await asyncio.sleep(0.005)
        answer = await router.ask(request(picture()))
        assert answer.status == 503
        assert f"/health says {health}" in answer.error["message"]


async def test_instances_of_different_models_are_told() -> None:
    encoder, language = Stub("enc", "encode", ("one",)), Stub("lang", "language", ("other",))
    async with routed(encoder, language) as router:
        (missing,) = (await router.get("/ready")).json()["missing"]
        assert missing.startswith("no model is served by both")
        assert (await router.get("/v1/models")).json()["data"] == []
        assert (await router.ask({**request(picture()), "model": "other"})).status == 503
    assert encoder.requests + language.requests == []
