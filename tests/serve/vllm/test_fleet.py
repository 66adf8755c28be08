"""Which instance a request or an item goes to."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from embferry.serve.config import RouterSettings, Settings, VllmSettings
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.instance import Instance
from tests.serve.vllm.stubs import (
    Network,
    Router,
    Stub,
    encoder_stubs,
    language_stubs,
    picture,
    request,
    routed,
    until,
)

pytestmark = pytest.mark.asyncio


async def fleet_of(*stubs: Stub, **vllm: object) -> Fleet:
    """Returns a fleet that has probed every instance once."""
    urls = {f"{role}_urls": tuple(s.url for s in stubs if s.role == role) for role in ("encode", "language")}
    settings = Settings(router=RouterSettings(engine="vllm"), vllm=VllmSettings.model_validate({**urls, **vllm}))
    fleet = Fleet(settings, Network(*stubs))
    await asyncio.gather(*(fleet._probe(instance) for instance in fleet.instances))
    return fleet


async def home(fleet: Fleet, uuid: str) -> Instance:
    found = await fleet.encoder(uuid, "tiny", (), ())
    assert found is not None
    return found


async def test_each_item_has_a_home_and_homes_are_spread() -> None:
    fleet = await fleet_of(*encoder_stubs(4))
    names = [f"item {number}" for number in range(400)]
    homes = {name: (await home(fleet, name)).url for name in names}
    assert {name: (await home(fleet, name)).url for name in names} == homes
    assert min(Counter(homes.values()).values()) > 60
    fewer = await fleet_of(*encoder_stubs(3))
    moved = [name for name in names if (await home(fewer, name)).url != homes[name]]
    assert {homes[name] for name in moved} == {"http://enc3"}  # items of the other encoders stay


async def test_an_item_leaves_a_home_that_is_much_more_loaded() -> None:
    fleet = await fleet_of(*encoder_stubs(2), affinity_slack=2)
    mine = await home(fleet, "x")
    (other,) = (one for one in fleet.encoders if one is not mine)
    with fleet.count_in_flight(mine), fleet.count_in_flight(mine):
        assert await home(fleet, "x") is mine
        with fleet.count_in_flight(mine):
            assert await home(fleet, "x") is other
            with fleet.count_in_flight(other):
                assert await home(fleet, "x") is mine
    assert fleet.in_flight[mine] == fleet.in_flight[other] == 0


async def test_equally_loaded_language_instances_take_turns() -> None:
    fleet = await fleet_of(*language_stubs(3))
    seen = []
    for _ in range(6):
        one = await fleet.language("tiny", ())
        assert one is not None
        with fleet.count_in_flight(one):
            other = await fleet.language(None, ())
            assert other is not None
            assert other is not one
        seen.append(one.url)
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


async def test_tried_encoders_are_skipped_and_avoided_ones_come_last() -> None:
    fleet = await fleet_of(*encoder_stubs(2))
    mine = await home(fleet, "x")
    (other,) = (one for one in fleet.encoders if one is not mine)
    assert await fleet.encoder("x", None, {mine.incarnation}, ()) is other
    assert await fleet.encoder("x", None, (), {mine.url}) is other
    assert await fleet.encoder("x", None, {other.incarnation}, {mine.url}) is mine
    assert await fleet.encoder("x", None, {mine.incarnation, other.incarnation}, ()) is None


async def test_a_restarted_instance_may_be_tried_again() -> None:
    (stub,) = encoder_stubs(1)
    fleet = await fleet_of(stub)
    (instance,) = fleet.encoders
    incarnation = instance.incarnation
    instance.remember("x")
    stub.up = False
    await fleet._probe(instance)
    assert not instance.up
    assert await fleet.encoder("x", None, (), ()) is None
    stub.up = True
    assert await fleet.encoder("x", None, {incarnation}, ()) is instance
    assert "x" not in instance.encoded


async def test_an_instance_is_down_after_one_probe_of_the_stall_timeout() -> None:
    class Watched(Network):
        async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
            waited.append(asked.extensions["timeout"]["read"])
            return await super().handle_async_request(asked)

    waited: list[float] = []
    (stub,) = encoder_stubs(1)
    settings = Settings(router=RouterSettings(stall_timeout=7), vllm=VllmSettings(encode_urls=(stub.url,)))
    fleet = Fleet(settings, Watched(stub))
    (instance,) = fleet.encoders
    await fleet._probe(instance)
    assert instance.up
    stub.silent, waited[:] = True, []
    await fleet._probe(instance)
    assert not instance.up
    assert waited == [7]
    stub.silent = False
    await fleet._probe(instance)
    assert instance.up


@pytest.mark.parametrize("health", [503, 500, 404])
async def test_an_unhealthy_instance_is_down(health: int) -> None:
    encoder, language = Stub("enc", "encode"), Stub("lang", "language")
    async with routed(encoder, language) as router:
        encoder.health = health
        await router.until_up(encode=0)
        answer = await router.ask(request(picture()))
        assert answer.status == 503
        assert f"/health says {health}" in answer.error["message"]


async def test_instances_of_different_models_are_reported() -> None:
    encoder, language = Stub("enc", "encode", ("one",)), Stub("lang", "language", ("other",))
    async with routed(encoder, language) as router:
        (missing,) = (await router.get("/ready")).json()["missing"]
        assert missing.startswith("no model is served by both")
        assert [one["id"] for one in (await router.get("/v1/models")).json()["data"]] == ["other"]
        for model, role, lacks in (("other", "language", "encode"), ("one", "encode", "language")):
            answer = await router.ask({**request(picture()), "model": model})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            assert f"is served by {role} instances (" in answer.error["message"]
            assert f"by no {lacks} instance" in answer.error["message"]
    assert encoder.requests + language.requests == []


async def until_serves(router: Router, **models: tuple[str, ...]) -> None:
    """Waits until the instances of each role serve these models, by the router's own list."""

    async def do_serve() -> bool:
        workers = (await router.get("/workers")).json()["workers"]
        return all(tuple(one["models"]) == models[one["role"]] for one in workers)

    await until(do_serve)


async def test_an_adapter_that_is_loaded_at_run_time_is_seen_by_the_next_probe() -> None:
    encoder, language = Stub("enc", "encode"), Stub("lang", "language")
    async with routed(encoder, language) as router:
        asked = {**request(picture()), "model": "cats"}
        language.models = ("tiny", "cats")
        await until_serves(router, language=("tiny", "cats"), encode=("tiny",))
        refused = await router.ask(asked)
        assert (refused.status, refused.error["code"]) == (404, "model_not_found")
        assert encoder.requests == []
        assert (await router.ask({"model": "cats", "messages": [{"role": "user", "content": "hello"}]})).status == 200
        encoder.models = ("tiny", "cats")
        await until_serves(router, language=("tiny", "cats"), encode=("tiny", "cats"))
        assert (await router.ask(asked)).status == 200
        language.models = ("tiny",)
        await until_serves(router, language=("tiny",), encode=("tiny", "cats"))
        assert (await router.ask(asked)).status == 404


async def test_a_model_of_an_instance_that_is_down_may_come_back() -> None:
    lost, encoder, language = (
        Stub("enc1", "encode", ("one",)),
        Stub("enc2", "encode", ("two",)),
        Stub("lang", "language", ("one", "two")),
    )
    async with routed(lost, encoder, language) as router:
        lost.up = False
        await router.until_up(encode=1)
        answer = await router.ask({**request(picture()), "model": "one"})
        assert (answer.status, answer.error["code"]) == (503, "no_worker")


class Counted:
    """Tells a fleet which instances there are."""

    def __init__(self, *stubs: Stub) -> None:
        self.stubs = stubs
        self._changed = asyncio.Event()

    def urls(self, role: str) -> list[str]:
        return [stub.url for stub in self.stubs if stub.role == role]

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def change(self, *stubs: Stub) -> None:
        self.stubs = stubs
        self._changed.set()


async def test_instances_come_and_go_with_what_counts_them() -> None:
    """One that is not counted any more gets no new request, and is probed until it has ended."""
    (language,), (first, second) = language_stubs(1), encoder_stubs(2)
    source = Counted(language, first)
    settings = Settings(router=RouterSettings(engine="vllm", poll_interval=0.01))
    fleet = Fleet(settings, Network(language, first, second), source)
    watching = asyncio.create_task(fleet.watch())
    await until(lambda: fleet.counts() == {"encode": 1, "language": 1})
    assert not fleet.missing()
    (going,) = fleet.encoders
    source.change(language, first, second)
    await until(lambda: fleet.counts() == {"encode": 2, "language": 1})
    assert fleet.encoders[0] is going  # with what the router knows of it
    source.change(language, second)
    await until(lambda: fleet.counts() == {"encode": 1, "language": 1})
    assert [one.url for one in fleet.encoders] == [second.url]
    assert {(await home(fleet, f"item {number}")).url for number in range(20)} == {second.url}
    first.health = 503  # it has ended
    await until(lambda: not going.up)
    source.change()
    await until(lambda: fleet.counts() == {"encode": 0, "language": 0})
    assert len(fleet.missing()) == 2
    watching.cancel()
    await asyncio.wait({watching})
    await fleet.close()
