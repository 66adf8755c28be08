"""An encode instance that fails every encode is passed over; a busy one, and one that gets damaged files, is not."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from embferry.serve.vllm import fitness
from tests.serve.vllm.stubs import Router, Stub, encoded, picture, request, routed, until

pytestmark = pytest.mark.asyncio

TOLD = '{"error":{"message":"CUDA error"}}'


def says(status: int, text: str = "CUDA error") -> Any:
    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(status, json={"error": {"message": text}})

    return behave


async def no_entry(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, json={"choices": []})


class Faulty(Stub):
    """An encode instance that has one behaviour, for the pictures in ``only`` if there are any, until it is mended."""

    how: Any = None
    only: frozenset[str] = frozenset()
    mended = False

    async def chat(self, body: dict[str, Any]) -> httpx.Response:
        is_bad = not self.mended and (not self.only or uuid_of(body) in self.only)
        response: httpx.Response = await (self.how if is_bad else encoded())(self, body)
        return response


def faulty(how: Any) -> Faulty:
    stub = Faulty("bad", "encode")
    stub.how = how
    return stub


def uuid_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][0]["uuid"])


async def ask(router: Router, *names: str) -> list[int]:
    return [(await router.ask(request(picture(name.encode())))).status for name in names]


async def usable(router: Router) -> int:
    """Returns how many encode instances the router uses."""
    return int((await router.get("/ready")).json()["workers"]["encode"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "AGAIN_SECONDS", 0.01)


@pytest.mark.parametrize("how", [says(500), no_entry], ids=["500", "no entry"])
async def test_an_instance_that_fails_every_encode_is_passed_over_until_it_encodes(how: Any) -> None:
    bad, good = faulty(how), Stub("good", "encode")
    async with routed(bad, good, Stub("l", "language")) as router:
        number = 0
        while await usable(router) == 2:
            number += 1
            assert number < 200
            assert await ask(router, str(number)) == [200]
        workers = {one["url"]: one for one in (await router.get("/workers")).json()["workers"]}
        assert (workers["http://bad"]["up"], workers["http://good"]["up"]) == (False, True)
        assert workers["http://bad"]["trouble"]
        assert (await router.get("/ready")).status == 200
        before = len(bad.requests)
        assert await ask(router, *(f"later {number}" for number in range(20))) == [200] * 20
        assert not {uuid_of(one) for one in bad.requests[before:]} & {uuid_of(one) for one in good.requests}
        bad.mended = True

        async def are_both() -> bool:
            return await usable(router) == 2

        await until(are_both)


async def test_ready_says_that_no_instance_encodes() -> None:
    bad = faulty(says(500))
    async with routed(bad, Stub("l", "language")) as router:
        assert set(await ask(router, "1", "2", "3")) == {502}

        async def is_unfit() -> bool:
            return await usable(router) == 0

        await until(is_unfit)
        ready = await router.get("/ready")
        missing = f"no encode instance encodes: http://bad status 500: {TOLD}"
        assert (ready.status, ready.json()["missing"]) == (503, [missing])
        bad.mended = True  # it is asked all the same: there is no other
        assert await ask(router, "4") == [200]
        assert (await router.get("/ready")).status == 200


@pytest.mark.parametrize("how", [says(503), says(429), says(400)], ids=["busy", "too many", "refuses"])
async def test_an_instance_that_is_busy_or_refuses_is_not_tested(how: Any) -> None:
    bad = faulty(how)
    async with routed(bad, good := Stub("good", "encode"), Stub("l", "language")) as router:
        names = [str(number) for number in range(20)]
        await ask(router, *names)
        bad.mended = True
        count = len(bad.requests)
        await ask(router, *names)  # would let a test run
        own = {uuid_of(one) for one in bad.requests[:count]} - {uuid_of(one) for one in bad.requests[count:]}
        assert own <= {uuid_of(one) for one in good.requests}
        assert await usable(router) == 2


async def test_an_instance_that_gets_damaged_files_is_not_unfit() -> None:
    """They fail there with 500, and so elsewhere. The router's own picture does not."""
    stub = faulty(says(500, "cannot decode"))
    async with routed(stub, Stub("l", "language")) as router:
        names = [str(number) for number in range(10)]
        stub.mended = True
        await ask(router, *names)
        stub.only, stub.mended = frozenset(map(uuid_of, stub.requests)), False
        assert set(await ask(router, *(name for name in names for _ in range(2)))) <= {400, 200}
        assert await usable(router) == 1
        assert await ask(router, "sound") == [200]


async def test_tests_of_an_instance_end_with_the_router() -> None:
    bad = faulty(says(500))
    async with routed(bad, Stub("l", "language")) as router:
        await ask(router, "1", "2", "3")

        async def is_unfit() -> bool:
            return await usable(router) == 0

        await until(is_unfit)
    assert asyncio.all_tasks() == {asyncio.current_task()}
