"""What consumers may tell the router, and what it does then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.serve.vllm.stubs import (
    Answer,
    Behaviour,
    Call,
    Router,
    Stub,
    encoded,
    held,
    lost,
    picture,
    refused,
    request,
    routed,
    text,
)

pytestmark = pytest.mark.asyncio

GONE = {"code": "peer_gone", "message": "killed", "endpoint": "tcp://enc0:1"}


@contextlib.asynccontextmanager
async def under_way(
    encoders: list[Stub], language: Stub, **vllm: Any
) -> AsyncIterator[tuple[Router, Call, dict[str, Any]]]:
    """A request whose answer the language instance holds back, and the coordinates it has."""
    language.behaviours = [held]
    async with routed(*encoders, language, **vllm) as router:
        call = router.call(request(picture(), text()))
        async with asyncio.timeout(5):
            while not language.requests:
                await asyncio.sleep(0)
        ((_, entry),) = language.requests[0]["ec_transfer_params"].items()
        yield router, call, entry["embferry"]


def three() -> tuple[list[Stub], Stub]:
    return [Stub(f"enc{number}", "encode") for number in range(3)], Stub("lang", "language")


async def replaced(router: Router, where: dict[str, Any], **told: Any) -> Answer:
    body = {"code": "peer_gone", "message": "killed", "endpoint": where["endpoint"], **told}
    return await router.post(f"/ec/replacements/{where['replacement']}", body)


async def test_an_embedding_under_way_comes_from_elsewhere() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        seen = [first["endpoint"]]
        where = first
        for _ in range(2):
            answer = await replaced(router, where)
            assert answer.status == 200
            where = answer.json()["embferry"]
            assert {key: where[key] for key in ("room", "replacement")} == {
                key: first[key] for key in ("room", "replacement")
            }
            seen.append(where["endpoint"])
        assert len(set(seen)) == 3  # each at another encoder
        assert encoders[0].requests[0].get("ec_transfer_params") in (None, {"embferry": {"room": first["room"]}})
        assert await router.counted("replacements_total", '{outcome="replaced"}') == 2
        language.release.set()
        assert (await call.answer()).status == 200


async def test_the_same_loss_told_twice_is_replaced_once() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, _, first):
        one, other = await asyncio.gather(replaced(router, first), replaced(router, first))
        assert one.json() == other.json()
        assert sum(len(encoder.requests) for encoder in encoders) == 2
        language.release.set()


async def test_replacements_are_counted() -> None:
    encoders, language = three()
    async with under_way(encoders, language, replacements_per_item=1) as (router, _, first):
        where = (await replaced(router, first)).json()["embferry"]
        answer = await replaced(router, where)
        assert answer.status == 503
        assert "1 times" in answer.error["message"]
        assert await router.counted("replacements_total", '{outcome="used_up"}') == 1
        language.release.set()


async def test_without_another_encoder_there_is_no_replacement() -> None:
    encoder, language = Stub("enc0", "encode"), Stub("lang", "language")
    async with under_way([encoder], language) as (router, _, first):
        answer = await replaced(router, first)
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert len(encoder.requests) == 1
        language.release.set()


async def test_one_that_was_started_again_is_another_encoder() -> None:
    encoder, language = Stub("enc0", "encode"), Stub("lang", "language")
    async with under_way([encoder], language) as (router, _, first):
        for up in (False, True):
            encoder.up = up
            async with asyncio.timeout(5):
                while (await router.get("/ready")).json()["workers"]["encode"] != up:
                    await asyncio.sleep(0.002)
        answer = await replaced(router, first)
        assert (answer.status, answer.json()["embferry"]["room"]) == (200, first["room"])
        language.release.set()


@pytest.mark.parametrize("behaviour", [refused(500), lost(), encoded(embferry=None)])
async def test_a_replacement_is_tried_elsewhere_too(behaviour: Behaviour) -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, _, first):
        shared = [behaviour]
        for encoder in encoders:
            encoder.behaviours = shared
        assert (await replaced(router, first)).status == 200
        assert shared == []
        language.release.set()


async def test_one_that_offers_it_in_another_room_is_of_no_use() -> None:
    async def elsewhere(stub: Stub, body: dict[str, Any]) -> Any:
        return await encoded(room=99)(stub, {**body, "ec_transfer_params": None})

    encoders, language = three()
    async with under_way(encoders[:2], language) as (router, _, first):
        encoders[0].behaviours = encoders[1].behaviours = [elsewhere]
        answer = await replaced(router, first)
        assert answer.status == 503
        assert "another room" in answer.error["message"]
        language.release.set()


@pytest.mark.parametrize("path", ["replacements", "failures"])
async def test_tokens_are_good_only_for_their_request(path: str) -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        for token in ("x", "", first["replacement"][:-1], f"{first['replacement']}x", f"{first['replacement']}/x"):
            answer = await router.post(f"/ec/{path}/{token}", GONE)
            assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert (await router.post(f"/ec/{path}/{first['replacement']}", b"nonsense")).status == 400
        assert (await router.post(f"/ec/{path}/{first['replacement']}", b"[" + b" " * 20_000)).status == 413
        language.release.set()
        await call.answer()
        assert (await router.post(f"/ec/{path}/{first['replacement']}", GONE)).status == 404


async def test_tokens_end_when_the_client_leaves() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        call.leave()
        async with asyncio.timeout(5):
            await call.task
        assert (await replaced(router, first)).status == 404


@pytest.mark.parametrize(("retryable", "status", "attempts"), [(True, 503, 2), (False, 502, 1)])
async def test_the_client_is_told_why_it_failed(retryable: bool, status: int, attempts: int) -> None:
    encoders, language = three()

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        ((_, entry),) = body["ec_transfer_params"].items()
        why = {"code": "peer_gone", "message": "the producer was killed", "retryable": retryable}
        answer = await routers[0].post(f"/ec/failures/{entry['embferry']['replacement']}", why)
        assert answer.status == 204
        return await refused(500)(stub, body)

    routers: list[Router] = []
    language.behaviours = [fails, fails]
    async with routed(*encoders, language) as router:
        routers.append(router)
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.error["code"]) == (status, "peer_gone")
        assert "the producer was killed" in answer.error["message"]
        assert answer.headers["x-should-retry"] == ("true" if retryable else "false")
        assert len(language.requests) == attempts
        assert await router.counted("failures_total", '{code="peer_gone"}') == 1
        rooms = [body["ec_transfer_params"].popitem()[1]["embferry"]["endpoint"] for body in language.requests]
        assert len(set(rooms)) == attempts  # the second time from elsewhere
