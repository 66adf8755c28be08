"""Repeated items: a language instance that has received one gets its name, and it is not encoded again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from embferry.serve.vllm import received_cache
from tests.serve.vllm.stubs import (
    SHAPE,
    Answer,
    Call,
    Router,
    Stub,
    completion,
    encoded,
    encoder_stubs,
    held,
    language_stubs,
    picture,
    refused,
    request,
    routed,
    text,
    until,
)

pytestmark = pytest.mark.asyncio

NBYTES = 48 * 64 * 4
"""Bytes of one embedding of the stubs."""


def coordinates(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the coordinates in a request to a language instance."""
    return [entry["embferry"] for entry in body["ec_transfer_params"].values()]


async def test_a_received_item_is_named_and_not_encoded_again() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        answers = [await router.ask(request(picture(), text())) for _ in range(3)]
        assert [answer.json() for answer in answers] == [completion("a red circle")] * 3
        assert len(encoder.requests) == 1
        assert await router.counted("encodes_skipped_total") == 2
    first, *others = language.requests
    (offered,) = coordinates(first)
    for other in others:
        assert other["messages"] == first["messages"]
        (named,) = coordinates(other)
        assert named["endpoint"] is None
        assert named["room"] != offered["room"]
        assert {key: named[key] for key in SHAPE} == SHAPE
    assert len({where["failover_token"] for body in language.requests for where in coordinates(body)}) == 3


async def test_only_the_new_items_of_a_request_are_encoded() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(b"a"), picture(b"b")))
        await router.ask(request(picture(b"b"), picture(b"c"), picture(b"a")))
    assert len(encoder.requests) == 3
    assert [where["endpoint"] for where in coordinates(language.requests[1])] == [None, "tcp://enc0:1", None]


async def test_other_encode_options_make_another_item() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        await router.ask(request(picture(), mm_processor_kwargs={"max_pixels": 9}))
    assert len(encoder.requests) == 2


async def test_an_item_that_the_instance_has_dropped_is_encoded_when_it_asks() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            assert len(encoder.requests) == 1
            answer = await ask_for(router, where)
            found = answer.json()["embferry"]
            assert found == {**where, "endpoint": "tcp://enc0:1"}
            assert encoder.requests[1]["ec_transfer_params"] == {"embferry": {"room": where["room"]}}
            assert (await ask_for(router, where)).json()["embferry"] == found  # the second time, nothing is encoded
            assert len(encoder.requests) == 2
            language.release.set()
            assert (await call.answer()).status == 200
        assert await router.counted("failovers_total", '{outcome="not_kept"}') == 1
        assert await router.counted("encodes_skipped_total") == 0


async def test_asking_for_a_dropped_item_does_not_count_as_a_failure() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language, failovers_per_item=1) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (_, where):
            where = (await ask_for(router, where)).json()["embferry"]
            answer = await ask_for(router, where)
            assert answer.status == 200
            assert answer.json()["embferry"]["endpoint"] != where["endpoint"]
            language.release.set()


async def test_an_instance_that_asks_gets_a_503_if_the_item_cannot_be_encoded() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            encoder.behaviours = [encoded(embferry=None)]
            answer = await ask_for(router, where)
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
            language.release.set()
            assert (await call.answer()).status == 200


async def test_concurrent_requests_share_one_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [held]
    async with routed(encoder, language) as router:
        calls = [router.call(request(picture(), text(str(number)))) for number in range(5)]
        await until(lambda: encoder.requests)
        encoder.release.set()
        assert [(await call.answer()).status for call in calls] == [200] * 5
        assert len(encoder.requests) == 1
        assert await router.counted("encodes_skipped_total") == 4
    rooms = {
        where["room"] for body in language.requests for where in coordinates(body) if where["endpoint"] is not None
    }
    assert rooms == {7}  # one offer, for the request that fetches first


async def test_if_the_shared_encode_fails_the_others_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        await stub.release.wait()
        return await encoded(embferry=None)(stub, body)

    encoder.behaviours = [fails, encoded(), encoded()]
    async with routed(encoder, language) as router:
        first = router.call(request(picture()))
        await until(lambda: encoder.requests)
        others = [router.call(request(picture())) for _ in range(2)]
        encoder.release.set()
        assert (await first.answer()).status == 502
        assert [(await call.answer()).status for call in others] == [200, 200]


@pytest.mark.parametrize("how", ["it fails", "its client leaves"])
async def test_the_offers_of_a_failed_request_are_not_shared(how: str) -> None:
    """Picture a was encoded and b was not, so the language instance never fetches a."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        await stub.release.wait()
        return await encoded(embferry=None)(stub, body)

    encoder.behaviours = [encoded(), fails, encoded()]
    async with routed(encoder, language) as router:
        call = router.call(request(picture(b"a"), picture(b"b")))
        await until(lambda: len(encoder.requests) == 2)
        await until(lambda: router.counted("encodes_total"))
        if how == "it fails":
            encoder.release.set()
            assert (await call.answer()).status == 502
        else:
            call.leave()
            await call.task
        assert (await router.ask(request(picture(b"a")))).status == 200
        assert len(encoder.requests) == 3


async def test_after_a_failed_answer_everything_is_encoded_again() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        language.behaviours = [refused(500)]
        assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 2
        assert are_named(language) == [False, True, False]


async def test_an_instance_that_does_not_ask_gets_everything_encoded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        language.behaviours = [refused(500)]
        for _ in range(3):
            assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 4
    assert "does its connector have `router` set?" in caplog.text


async def test_an_instance_that_reports_a_failure_is_still_trusted() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)

    async def reports(stub: Stub, body: dict[str, Any]) -> Any:
        (where,) = coordinates(body)
        why = {"code": "peer_gone", "message": "killed", "retryable": True}
        await routers[0].post(f"/ec/failures/{where['failover_token']}", why)
        return await refused(500)(stub, body)

    routers: list[Router] = []
    async with routed(encoder, language) as router:
        routers.append(router)
        await router.ask(request(picture()))
        language.behaviours = [reports]
        for _ in range(3):
            assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 2


async def test_a_restarted_instance_has_nothing() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        for up in (False, True):
            language.up = up
            await router.until_up(language=int(up))
        await router.ask(request(picture()))
    assert len(encoder.requests) == 2


async def test_a_request_goes_to_the_instance_with_most_of_its_items() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(3)
    async with routed(encoder, *languages) as router:
        homes: dict[bytes, Stub] = {}
        for content in (b"a", b"b", b"c"):
            homes[content] = await instance_for(router, languages, picture(content))
        assert len({stub.host for stub in homes.values()}) == 3
        for content, home in homes.items():
            assert await instance_for(router, languages, picture(content)) is home
        both = await instance_for(router, languages, picture(b"a"), picture(b"b"))
        assert both in (homes[b"a"], homes[b"b"])
        assert await instance_for(router, languages, picture(b"b"), picture(b"a")) is both
    assert len(encoder.requests) == 4


async def test_a_request_leaves_an_instance_that_is_much_more_loaded() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
    async with routed(encoder, *languages, affinity_slack=1) as router:
        home = await instance_for(router, languages, picture())
        (other,) = (stub for stub in languages if stub is not home)
        home.behaviours = [held, held]
        calls = [router.call(request(picture())) for _ in range(2)]
        await until(lambda: len(home.requests) == 3)
        assert await instance_for(router, languages, picture()) is other
        home.release.set()
        assert [(await call.answer()).status for call in calls] == [200, 200]
    assert len(encoder.requests) == 2


async def test_the_instance_that_answered_has_the_items() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
    async with routed(encoder, *languages) as router:
        full: list[Stub] = []

        async def is_full(stub: Stub, body: dict[str, Any]) -> Any:
            full.append(stub)
            return await refused(503)(stub, body)

        languages[0].behaviours = languages[1].behaviours = [is_full]
        assert (await router.ask(request(picture()))).status == 200
        assert [len(stub.requests) for stub in languages] == [1, 1]
        for _ in range(3):
            assert await instance_for(router, languages, picture()) is not full[0]
    assert len(encoder.requests) == 1


async def test_the_cache_is_limited_in_bytes() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, received_bytes=2 * NBYTES) as router:
        for number, content in enumerate((b"a", b"b", b"a", b"c", b"a", b"b")):
            await router.ask(request(text(str(number)), picture(content)))  # no prompt begins as an earlier one
    assert are_named(language) == [False, False, True, False, True, False]  # c has displaced b, the oldest


async def test_the_cache_is_limited_in_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_cache, "MAX_KEPT", 1)
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        for number, content in enumerate((b"a", b"a", b"b", b"a")):
            await router.ask(request(text(str(number)), picture(content)))
    assert len(encoder.requests) == 3


@pytest.mark.parametrize("settings", [{"received_bytes": 0}, {"received_bytes": 1}, {"connector": "example"}])
async def test_without_a_cache_everything_is_encoded(settings: dict[str, Any]) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **settings) as router:
        for number in range(3):
            await router.ask(request(text(str(number)), picture()))
        assert await router.counted("encodes_skipped_total") == 0
    assert len(encoder.requests) == 3


def are_named(language: Stub) -> list[bool]:
    """Returns, for each item of each request to the instance, whether it had a name and no endpoint."""
    return [where["endpoint"] is None for body in language.requests for where in coordinates(body)]


@asynccontextmanager
async def answering(router: Router, language: Stub) -> AsyncIterator[tuple[Call, dict[str, Any]]]:
    """Yields a request that repeats the picture and pauses at its language instance, and the instance's coordinates."""
    language.behaviours = [held]
    call = router.call(request(picture()))
    await until(lambda: len(language.requests) == 2)
    (where,) = coordinates(language.requests[1])
    assert where["endpoint"] is None
    yield call, where


async def ask_for(router: Router, where: dict[str, Any]) -> Answer:
    """Asks for an item as a consumer does that has dropped it or lost its producer."""
    body = {"code": "peer_gone", "message": "not kept", "endpoint": where["endpoint"]}
    return await router.post(f"/ec/failovers/{where['failover_token']}", body)


async def instance_for(router: Router, languages: list[Stub], *content: Any) -> Stub:
    """Sends a request and returns the instance that was asked."""
    before = [len(stub.requests) for stub in languages]
    assert (await router.ask(request(*content))).status == 200
    (stub,) = (stub for stub, count in zip(languages, before, strict=True) if len(stub.requests) > count)
    return stub
