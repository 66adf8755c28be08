"""Items that come again: an instance that has one gets it named, and nobody encodes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from embferry.serve.vllm import repeats
from tests.serve.vllm.stubs import (
    SHAPE,
    Answer,
    Call,
    Router,
    Stub,
    completion,
    encoded,
    held,
    picture,
    refused,
    request,
    routed,
    text,
)

pytestmark = pytest.mark.asyncio

NBYTES = 48 * 64 * 4
"""Of one embedding of the stubs."""


def stubs(encoders: int = 1, languages: int = 1) -> tuple[list[Stub], list[Stub]]:
    return (
        [Stub(f"enc{number}", "encode") for number in range(encoders)],
        [Stub(f"lang{number}", "language") for number in range(languages)],
    )


def told(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The coordinates that a language instance was sent."""
    return [entry["embferry"] for entry in body["ec_transfer_params"].values()]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_an_instance_has_received_is_named_and_not_encoded() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        answers = [await router.ask(request(picture(), text())) for _ in range(3)]
        assert [answer.json() for answer in answers] == [completion("a red circle")] * 3
        assert len(encoder.requests) == 1
        assert await router.counted("encodes_skipped_total") == 2
    first, *others = language.requests
    (offered,) = told(first)
    for other in others:
        assert other["messages"] == first["messages"]
        (named,) = told(other)
        assert named["endpoint"] is None
        assert named["room"] != offered["room"]
        assert {key: named[key] for key in SHAPE} == SHAPE
    assert len({where["replacement"] for body in language.requests for where in told(body)}) == 3


async def test_only_what_is_new_in_a_request_is_encoded() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture(b"a"), picture(b"b")))
        await router.ask(request(picture(b"b"), picture(b"c"), picture(b"a")))
    assert len(encoder.requests) == 3
    assert [where["endpoint"] for where in told(language.requests[1])] == [None, "tcp://enc0:1", None]


async def test_the_same_picture_encoded_in_another_way_is_another_item() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        await router.ask(request(picture(), mm_processor_kwargs={"max_pixels": 9}))
    assert len(encoder.requests) == 2


async def test_what_it_has_not_any_more_is_encoded_when_it_asks() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            assert len(encoder.requests) == 1
            answer = await asked_for(router, where)
            found = answer.json()["embferry"]
            assert found == {**where, "endpoint": "tcp://enc0:1"}
            assert encoder.requests[1]["ec_transfer_params"] == {"embferry": {"room": where["room"]}}
            assert (await asked_for(router, where)).json()["embferry"] == found  # asked twice, encoded once
            assert len(encoder.requests) == 2
            language.release.set()
            assert (await call.answer()).status == 200
        assert await router.counted("replacements_total", '{outcome="not_kept"}') == 1
        assert await router.counted("encodes_skipped_total") == 0


async def test_to_ask_for_it_counts_as_no_failure_of_an_encoder() -> None:
    """So it may fail afterwards as often as any other, and at the same encoder."""
    encoders, (language,) = stubs(2)
    async with routed(*encoders, language, replacements_per_item=1) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (_, where):
            where = (await asked_for(router, where)).json()["embferry"]
            answer = await asked_for(router, where)
            assert answer.status == 200
            assert answer.json()["embferry"]["endpoint"] != where["endpoint"]
            language.release.set()


async def test_when_nobody_can_encode_it_the_instance_is_told() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            encoder.behaviours = [refused(500)]
            answer = await asked_for(router, where)
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
            language.release.set()
            assert (await call.answer()).status == 200


async def test_one_that_comes_while_the_same_is_encoded_waits_for_that() -> None:
    (encoder,), (language,) = stubs()
    encoder.behaviours = [held]
    async with routed(encoder, language) as router:
        calls = [router.call(request(picture(), text(str(number)))) for number in range(5)]
        await until(lambda: encoder.requests)
        encoder.release.set()
        assert [(await call.answer()).status for call in calls] == [200] * 5
        assert len(encoder.requests) == 1
        assert await router.counted("encodes_skipped_total") == 4
    rooms = {where["room"] for body in language.requests for where in told(body) if where["endpoint"] is not None}
    assert rooms == {7}  # one offer, for whichever comes first


@pytest.mark.parametrize("how", ["it fails", "its client leaves"])
async def test_and_encodes_itself_when_that_comes_to_nothing(how: str) -> None:
    (encoder,), (language,) = stubs()

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        await stub.release.wait()
        return await refused(500)(stub, body)

    encoder.behaviours = [fails, encoded(), encoded()]
    async with routed(encoder, language) as router:
        first = router.call(request(picture()))
        await until(lambda: encoder.requests)
        others = [router.call(request(picture())) for _ in range(2)]
        if how == "it fails":
            encoder.release.set()
            assert (await first.answer()).status == 502
        else:
            first.leave()
        assert [(await call.answer()).status for call in others] == [200, 200]


@pytest.mark.parametrize("how", ["it fails", "its client leaves"])
async def test_what_was_offered_to_a_request_that_came_to_nothing_is_not_shared(how: str) -> None:
    """One of its pictures was encoded, the other was not: nobody fetches the first."""
    (encoder,), (language,) = stubs()

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        await stub.release.wait()
        return await refused(500)(stub, body)

    encoder.behaviours = [encoded(), fails, encoded()]
    async with routed(encoder, language) as router:
        call = router.call(request(picture(b"a"), picture(b"b")))
        await until(lambda: len(encoder.requests) == 2)
        async with asyncio.timeout(5):
            while await router.counted("encodes_total") < 1:
                await asyncio.sleep(0.001)
        if how == "it fails":
            encoder.release.set()
            assert (await call.answer()).status == 502
        else:
            call.leave()
            await call.task
        assert (await router.ask(request(picture(b"a")))).status == 200
        assert len(encoder.requests) == 3


async def test_after_a_failure_everything_is_encoded() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        language.behaviours = [refused(500)]
        assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 2
        assert [where["endpoint"] is None for body in language.requests for where in told(body)] == [False, True, False]


async def test_an_instance_that_does_not_ask_is_not_expected_to_have_anything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        language.behaviours = [refused(500)]
        for _ in range(3):
            assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 4
    assert "has its connector the address of `router`?" in caplog.text


async def test_one_that_said_why_is_still_trusted() -> None:
    (encoder,), (language,) = stubs()

    async def says(stub: Stub, body: dict[str, Any]) -> Any:
        (where,) = told(body)
        why = {"code": "peer_gone", "message": "killed", "retryable": True}
        await routers[0].post(f"/ec/failures/{where['replacement']}", why)
        return await refused(500)(stub, body)

    routers: list[Router] = []
    async with routed(encoder, language) as router:
        routers.append(router)
        await router.ask(request(picture()))
        language.behaviours = [says]
        for _ in range(3):
            assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 2


async def test_one_that_was_started_again_has_nothing() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        for up in (False, True):
            language.up = up
            async with asyncio.timeout(5):
                while (await router.get("/ready")).json()["workers"]["language"] != up:
                    await asyncio.sleep(0.002)
        await router.ask(request(picture()))
    assert len(encoder.requests) == 2


async def test_a_request_goes_to_the_instance_that_has_most_of_it() -> None:
    (encoder,), languages = stubs(languages=3)
    async with routed(encoder, *languages) as router:
        homes: dict[bytes, Stub] = {}
        for content in (b"a", b"b", b"c"):
            homes[content] = await _taken(router, languages, picture(content))
        assert len({stub.host for stub in homes.values()}) == 3
        for content, home in homes.items():
            assert await _taken(router, languages, picture(content)) is home
        both = await _taken(router, languages, picture(b"a"), picture(b"b"))
        assert both in (homes[b"a"], homes[b"b"])
        assert await _taken(router, languages, picture(b"b"), picture(b"a")) is both
    assert len(encoder.requests) == 4


async def test_unless_that_has_much_more_in_hand() -> None:
    (encoder,), languages = stubs(languages=2)
    async with routed(encoder, *languages, affinity_slack=1) as router:
        home = await _taken(router, languages, picture())
        (other,) = (stub for stub in languages if stub is not home)
        home.behaviours = [held, held]
        calls = [router.call(request(picture())) for _ in range(2)]
        await until(lambda: len(home.requests) == 3)
        assert await _taken(router, languages, picture()) is other
        home.release.set()
        assert [(await call.answer()).status for call in calls] == [200, 200]
    assert len(encoder.requests) == 2


async def test_the_one_that_answered_has_it() -> None:
    (encoder,), languages = stubs(languages=2)
    async with routed(encoder, *languages) as router:
        full: list[Stub] = []

        async def is_full(stub: Stub, body: dict[str, Any]) -> Any:
            full.append(stub)
            return await refused(503)(stub, body)

        languages[0].behaviours = languages[1].behaviours = [is_full]
        assert (await router.ask(request(picture()))).status == 200
        assert [len(stub.requests) for stub in languages] == [1, 1]
        for _ in range(3):
            assert await _taken(router, languages, picture()) is not full[0]
    assert len(encoder.requests) == 1


async def test_as_much_is_expected_to_be_kept_as_was_said() -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language, received_bytes=2 * NBYTES) as router:
        for content in (b"a", b"b", b"a", b"c", b"a", b"b"):
            await router.ask(request(picture(content)))
    assert [where["endpoint"] is None for body in language.requests for where in told(body)] == [
        *(False, False, True),
        *(False, True, False),  # b was the oldest when c came
    ]


async def test_and_no_more_than_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MAX_KEPT", 1)
    (encoder,), (language,) = stubs()
    async with routed(encoder, language) as router:
        for content in (b"a", b"a", b"b", b"a"):
            await router.ask(request(picture(content)))
    assert len(encoder.requests) == 3


@pytest.mark.parametrize("settings", [{"received_bytes": 0}, {"received_bytes": 1}, {"connector": "example"}])
async def test_where_nothing_is_kept_everything_is_encoded(settings: dict[str, Any]) -> None:
    (encoder,), (language,) = stubs()
    async with routed(encoder, language, **settings) as router:
        for _ in range(3):
            await router.ask(request(picture()))
        assert await router.counted("encodes_skipped_total") == 0
    assert len(encoder.requests) == 3


@asynccontextmanager
async def answering(router: Router, language: Stub) -> AsyncIterator[tuple[Call, dict[str, Any]]]:
    """A request that repeats the picture, whose answer is held back, and the coordinates it has."""
    language.behaviours = [held]
    call = router.call(request(picture()))
    await until(lambda: len(language.requests) == 2)
    (where,) = told(language.requests[1])
    assert where["endpoint"] is None
    yield call, where


async def asked_for(router: Router, where: dict[str, Any]) -> Answer:
    """As a consumer does that does not have it, or has lost its producer."""
    body = {"code": "peer_gone", "message": "not kept", "endpoint": where["endpoint"]}
    return await router.post(f"/ec/replacements/{where['replacement']}", body)


async def _taken(router: Router, languages: list[Stub], *content: Any) -> Stub:
    """The instance that was asked."""
    before = [len(stub.requests) for stub in languages]
    assert (await router.ask(request(*content))).status == 200
    (stub,) = (stub for stub, count in zip(languages, before, strict=True) if len(stub.requests) > count)
    return stub
