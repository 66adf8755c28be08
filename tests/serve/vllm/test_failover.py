"""Reports of consumers about embeddings under way, and their failover to another encoder."""

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
    encoder_stubs,
    held,
    lost,
    picture,
    refused,
    request,
    routed,
    text,
    until,
)

pytestmark = pytest.mark.asyncio

GONE = {"code": "peer_gone", "message": "killed", "endpoint": "tcp://enc0:1"}


@contextlib.asynccontextmanager
async def under_way(
    encoders: list[Stub], language: Stub, **vllm: Any
) -> AsyncIterator[tuple[Router, Call, dict[str, Any]]]:
    """Yields the router, a request whose language instance pauses, and the coordinates that this instance has."""
    language.behaviours = [held]
    async with routed(*encoders, language, **vllm) as router:
        call = router.call(request(picture(), text()))
        await until(lambda: language.requests)
        ((_, entry),) = language.requests[0]["ec_transfer_params"].items()
        yield router, call, entry["embferry"]


def three() -> tuple[list[Stub], Stub]:
    return encoder_stubs(3), Stub("lang", "language")


async def report_loss(router: Router, where: dict[str, Any], **told: Any) -> Answer:
    body = {"code": "peer_gone", "message": "killed", "endpoint": where["endpoint"], **told}
    return await router.post(f"/ec/failovers/{where['failover_token']}", body)


async def test_a_lost_embedding_is_offered_by_another_encoder() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        seen = [first["endpoint"]]
        where = first
        for _ in range(2):
            answer = await report_loss(router, where)
            assert answer.status == 200
            where = answer.json()["embferry"]
            assert {key: where[key] for key in ("room", "failover_token")} == {
                key: first[key] for key in ("room", "failover_token")
            }
            seen.append(where["endpoint"])
        assert len(set(seen)) == 3  # each at another encoder
        assert encoders[0].requests[0].get("ec_transfer_params") in (None, {"embferry": {"room": first["room"]}})
        assert await router.counted("failovers_total", '{outcome="replaced"}') == 2
        language.release.set()
        assert (await call.answer()).status == 200


async def test_a_loss_that_is_reported_twice_is_replaced_once() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, _, first):
        one, other = await asyncio.gather(report_loss(router, first), report_loss(router, first))
        assert one.json() == other.json()
        assert sum(len(encoder.requests) for encoder in encoders) == 2
        language.release.set()


async def test_the_number_of_failovers_is_limited() -> None:
    encoders, language = three()
    async with under_way(encoders, language, failovers_per_item=1) as (router, _, first):
        where = (await report_loss(router, first)).json()["embferry"]
        answer = await report_loss(router, where)
        assert answer.status == 503
        assert "1 times" in answer.error["message"]
        assert await router.counted("failovers_total", '{outcome="used_up"}') == 1
        language.release.set()


async def test_without_another_encoder_the_report_gets_a_503() -> None:
    encoder, language = Stub("enc0", "encode"), Stub("lang", "language")
    async with under_way([encoder], language) as (router, _, first):
        answer = await report_loss(router, first)
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert len(encoder.requests) == 1
        language.release.set()


async def test_a_restarted_encoder_may_replace_itself() -> None:
    encoder, language = Stub("enc0", "encode"), Stub("lang", "language")
    async with under_way([encoder], language) as (router, _, first):
        for up in (False, True):
            encoder.up = up
            await router.until_up(encode=int(up))
        answer = await report_loss(router, first)
        assert (answer.status, answer.json()["embferry"]["room"]) == (200, first["room"])
        language.release.set()


@pytest.mark.parametrize("behaviour", [refused(500), lost(), encoded(embferry=None)])
async def test_a_failed_failover_is_tried_at_a_third_encoder(behaviour: Behaviour) -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, _, first):
        shared = [behaviour]
        for encoder in encoders:
            encoder.behaviours = shared
        assert (await report_loss(router, first)).status == 200
        assert shared == []
        language.release.set()


async def test_an_offer_in_another_room_is_refused() -> None:
    async def elsewhere(stub: Stub, body: dict[str, Any]) -> Any:
        return await encoded(room=99)(stub, {**body, "ec_transfer_params": None})

    encoders, language = three()
    async with under_way(encoders[:2], language) as (router, _, first):
        encoders[0].behaviours = encoders[1].behaviours = [elsewhere]
        answer = await report_loss(router, first)
        assert answer.status == 503
        assert "another room" in answer.error["message"]
        language.release.set()


@pytest.mark.parametrize("path", ["failovers", "failures"])
async def test_tokens_are_valid_only_for_their_request(path: str) -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        for token in (
            "x",
            "",
            first["failover_token"][:-1],
            f"{first['failover_token']}x",
            f"{first['failover_token']}/x",
        ):
            answer = await router.post(f"/ec/{path}/{token}", GONE)
            assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert (await router.post(f"/ec/{path}/{first['failover_token']}", b"nonsense")).status == 400
        assert (await router.post(f"/ec/{path}/{first['failover_token']}", b"[" + b" " * 20_000)).status == 413
        language.release.set()
        await call.answer()
        assert (await router.post(f"/ec/{path}/{first['failover_token']}", GONE)).status == 404


async def test_tokens_expire_when_the_client_leaves() -> None:
    encoders, language = three()
    async with under_way(encoders, language) as (router, call, first):
        call.leave()
        await call.task
        assert (await report_loss(router, first)).status == 404


@pytest.mark.parametrize(("retryable", "status", "attempts"), [(True, 503, 2), (False, 502, 1)])
async def test_the_client_gets_the_consumers_reason(retryable: bool, status: int, attempts: int) -> None:
    encoders, language = three()

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        ((_, entry),) = body["ec_transfer_params"].items()
        why = {"code": "peer_gone", "message": "the producer was killed", "retryable": retryable}
        answer = await routers[0].post(f"/ec/failures/{entry['embferry']['failover_token']}", why)
        assert answer.status == 204
        assert "content-digest" in answer.headers  # without it, the consumer takes the answer for damaged
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
        assert await router.counted("chat_errors_total", '{code="peer_gone"}') == 1
        rooms = [body["ec_transfer_params"].popitem()[1]["embferry"]["endpoint"] for body in language.requests]
        assert len(set(rooms)) == attempts  # the second time from elsewhere
