"""Pictures that the prefix cache of an instance may cover: they are named although the router has forgotten them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from embferry.serve.vllm import received_cache as module
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import media_parts
from embferry.serve.vllm.prompt_prefixes import prefixes_of
from tests.serve.vllm.stubs import (
    Stub,
    answered,
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
from tests.serve.vllm.test_received_cache import are_named, ask_for, coordinates

FORGETFUL = {"received_bytes": 1}
"""With this the router expects of no instance that it keeps an embedding."""


def turn(*earlier: tuple[Any, str], question: Any, **more: Any) -> dict[str, Any]:
    """Returns a request with earlier turns."""
    messages: list[dict[str, Any]] = []
    for content, answer in earlier:
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"model": "tiny", "messages": [*messages, {"role": "user", "content": question}], **more}


FIRST = [picture(), text("what is it?")]


@pytest.mark.asyncio
async def test_the_second_turn_of_a_conversation_costs_no_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:
        assert (await router.ask(turn(question=FIRST))).status == 200
        for question in ("and what colour?", [text("why?")]):
            assert (await router.ask(turn((FIRST, "a circle"), question=question))).status == 200
        assert await router.counted("encodes_skipped_total") == 2
    assert len(encoder.requests) == 1
    assert are_named(language) == [False, True, True]
    assert all(where["digest"] == "00" for body in language.requests for where in coordinates(body))


@pytest.mark.asyncio
async def test_a_later_picture_of_a_conversation_is_encoded_and_the_earlier_one_is_not() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:
        await router.ask(turn(question=FIRST))
        await router.ask(turn((FIRST, "a circle"), question=[picture(b"other"), text("and here?")]))
    assert len(encoder.requests) == 2
    assert are_named(language) == [False, True, False]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "other",
    [
        turn(question=[text("first"), *FIRST]),
        turn(question=FIRST, tools=[{"type": "function", "function": {"name": "f"}}]),
        turn(question=FIRST, cache_salt="mine"),
        turn((FIRST, "a circle"), question=FIRST),
        {**turn(question=FIRST), "messages": [{"role": "system", "content": "x"}, *turn(question=FIRST)["messages"]]},
    ],
    ids=["a text before", "tools", "another salt", "again, later", "a system message"],
)
async def test_another_beginning_is_another_prompt(other: dict[str, Any]) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:
        await router.ask(turn(question=FIRST))
        await router.ask(other)
    assert len(encoder.requests) == 2


@pytest.mark.asyncio
async def test_a_picture_that_the_prefix_cache_does_not_cover_is_encoded_when_the_instance_asks() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:
        await router.ask(turn(question=FIRST))
        language.behaviours = [held]
        call = router.call(turn((FIRST, "a circle"), question="more"))
        await until(lambda: len(language.requests) == 2)
        (where,) = coordinates(language.requests[1])
        assert where["endpoint"] is None
        assert (await ask_for(router, where)).json()["embferry"]["endpoint"] == "tcp://enc0:1"
        sent = encoder.requests[1]["messages"][0]["content"][0]
        assert sent["image_url"] == picture()["image_url"]
        language.release.set()
        assert (await call.answer()).status == 200
        assert await router.counted("encodes_skipped_total") == 0
        assert await router.counted("failovers_total", '{outcome="not_kept"}') == 1


@pytest.mark.asyncio
async def test_an_instance_without_a_prefix_cache_is_soon_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """After four misses in a row, one of sixteen requests tries again; a success ends that."""
    monkeypatch.setattr(module, "TRY_AGAIN", 3)
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:

        async def lacks_it(stub: Stub, body: dict[str, Any]) -> Any:
            for where in coordinates(body):
                if where["endpoint"] is None:
                    await ask_for(router, where)
            return await answered()(stub, body)

        language.behaviours = [lacks_it] * 12
        for number in range(12):
            assert (await router.ask(turn((FIRST, "a circle"), question=str(number)))).status == 200
        named = are_named(language)
        assert named == [False, True, True, True, True, False, False, True, False, False, True, False]
        assert len(encoder.requests) == 12
        for number in range(4):
            await router.ask(turn((FIRST, "a circle"), question=str(number)))
    assert are_named(language)[12:] == [False, True, True, True]


@pytest.mark.asyncio
async def test_a_request_goes_to_the_instance_that_may_have_its_prefix() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(3)
    async with routed(encoder, *languages, **FORGETFUL) as router:
        await router.ask(turn(question=FIRST))
        (home,) = (stub for stub in languages if stub.requests)
        for number in range(5):
            await router.ask(turn((FIRST, "a circle"), question=str(number)))
        assert len(home.requests) == 6
        home.up = False
        await router.until_up(language=2)
        await router.ask(turn((FIRST, "a circle"), question="elsewhere"))
        home.up = True
        await router.until_up(language=3)
        home.requests.clear()
        await router.ask(turn((FIRST, "a circle"), question="back"))
    assert len(encoder.requests) == 2


@pytest.mark.asyncio
async def test_after_a_failed_answer_everything_is_encoded() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, **FORGETFUL) as router:
        await router.ask(turn(question=FIRST))
        language.behaviours = [refused(500)]
        assert (await router.ask(turn((FIRST, "a circle"), question="more"))).status == 200
    assert are_named(language) == [False, True, False]


@pytest.mark.asyncio
async def test_the_memory_is_bounded_and_holds_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWERED", 2)
    caches: list[module.ReceivedCache] = []
    made = module.ReceivedCache.__init__

    def init(cache: module.ReceivedCache, encoder: Any) -> None:
        made(cache, encoder)
        caches.append(cache)

    monkeypatch.setattr(module.ReceivedCache, "__init__", init)
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        for content in (b"a", b"b", b"c"):
            await router.ask(request(picture(content)))
        (received,) = caches[0]._received.values()
        assert len(received.answered) == 2
        kept = [*received.answered.values(), *(entry.encoded for entry in received.entries.values())]
        assert len(kept) == 5
        assert {one.item.url for one in kept} == {""}
        monkeypatch.setattr(module, "MAX_METADATA", 10)
        await router.ask(request(picture(b"d")))
        assert len(received.answered) == 2
        await asyncio.sleep(0)


def test_the_last_place_of_an_item_counts() -> None:
    one, two = Item("image", "1", ""), Item("image", "2", "")

    def prefixes(*items: Item) -> dict[str, bytes]:
        asked = request(*[picture(item.uuid.encode()) for item in items])
        return prefixes_of(asked, list(zip(media_parts(asked), items, strict=True)))

    assert prefixes(one, two) != prefixes(two, one)
    assert prefixes(one, two)["1"] == prefixes(one)["1"] == prefixes(one, two, two)["1"]
    assert prefixes(one, two, one)["1"] != prefixes(one, two)["1"]
    assert prefixes(one, two, one)["2"] == prefixes(one, two)["2"]
