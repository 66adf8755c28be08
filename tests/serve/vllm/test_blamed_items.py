"""Items that are to blame for a failed encode: the file ends its instance, or the instance answers it with 500."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from embferry.serve.vllm.items import Item
from embferry.serve.vllm.losses import MAX_REMEMBERED, REMEMBERED_SECONDS, ItemError, Losses
from tests.serve.vllm.sound_parts import sound
from tests.serve.vllm.stubs import (
    Behaviour,
    Stub,
    encoded,
    encoder_stubs,
    held,
    language_stubs,
    lost,
    picture,
    refused,
    request,
    routed,
    until,
    video,
)

pytestmark = pytest.mark.asyncio


async def ends(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    """The instance ends, and is not there for the next probe."""
    stub.up = False
    raise httpx.ReadError("connection reset")


async def engine_ends(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    """The engine behind the server ends, as the server says."""
    stub.health = 503
    return await refused(500)(stub, body)


async def ends_when_released(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    await stub.hold()
    return await ends(stub, body)


ENDS: dict[str, Behaviour] = {"the process": ends, "its engine": engine_ends}


def asked(*encoders: Stub) -> int:
    return sum(len(encoder.requests) for encoder in encoders)


def poisoned(ending: Behaviour, *contents: bytes) -> Behaviour:
    """Ends on these files, and encodes others, for as long as the test lasts."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        stub.behaviours.append(behave)
        url = body["messages"][0]["content"][0].get("image_url")
        return await (ending if any(url == picture(one)["image_url"] for one in contents) else encoded())(stub, body)

    return behave


@pytest.mark.parametrize("language_encodes", [False, True])
@pytest.mark.parametrize("what", ENDS)
async def test_an_item_that_has_ended_two_instances_is_given_to_no_other(what: str, language_encodes: bool) -> None:
    encoders, (language,) = encoder_stubs(4), language_stubs(1)
    for encoder in encoders:
        encoder.behaviours = [poisoned(ENDS[what], b"poison")]
    async with routed(*encoders, language, language_encodes=language_encodes) as router:
        answer = await router.ask(request(picture(b"an innocent one"), picture(b"poison"), video()))
        assert (answer.status, answer.error["code"]) == (400, "media_decoder_failed")
        assert answer.error["param"] == "messages[0].content[1]"
        assert "x-should-retry" not in answer.headers
        assert "retry-after" not in answer.headers
        assert sum(encoder.up and encoder.health == 200 for encoder in encoders) == 2
        assert (await router.ask(request(picture(b"an innocent one"), video()))).status == 200


async def test_each_item_of_one_request_costs_one_instance_and_only_one_of_them_two() -> None:
    encoders, (language,) = encoder_stubs(8), language_stubs(1)
    contents = [str(number).encode() for number in range(4)]
    for encoder in encoders:
        encoder.behaviours = [poisoned(ends, *contents)]
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(*map(picture, contents)))
        assert (answer.status, answer.error["code"]) == (400, "media_decoder_failed")
        assert sum(encoder.up for encoder in encoders) >= 8 - len(contents) - 1


@pytest.mark.parametrize("what", ENDS)
async def test_one_item_costs_two_instances_at_most_however_often_it_is_sent(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoders, (language,) = encoder_stubs(4), language_stubs(1)
    for encoder in encoders:
        encoder.behaviours = [ENDS[what]] * 4
    async with routed(*encoders, language) as router:
        for _ in range(3):
            answer = await router.ask(request(picture(b"poison")))
            assert (answer.status, answer.error["code"]) == (400, "media_decoder_failed")
            assert answer.error["param"] == "messages[0].content[0]"
        assert asked(*encoders) == 2
        assert sum(encoder.up and encoder.health == 200 for encoder in encoders) == 2
        assert await router.counted("media_refused_total", '{reason="instances_lost"}') == 3
        for encoder in encoders:
            encoder.behaviours.clear()
        assert (await router.ask(request(picture(b"another")))).status == 200
    assert "2 instances ended while they encoded this picture" in caplog.text


async def test_an_item_that_an_instance_refuses_has_cost_no_instance() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [refused(400, message="Failed to load image: cannot identify image file")]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(b"damaged")))
        assert (answer.status, answer.error["code"]) == (400, "image_corrupt")
        assert await router.counted("media_refused_total", '{reason="instances_lost"}') == 0


@pytest.mark.parametrize("what", ENDS)
async def test_an_innocent_item_whose_instance_is_killed_is_encoded_elsewhere(what: str) -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    encoders[0].behaviours = encoders[1].behaviours = shared = [ENDS[what]]
    async with routed(*encoders, language, received_bytes=0) as router:
        assert (await router.ask(request(picture()))).status == 200
        assert shared == []
        assert asked(*encoders) == 2
        for encoder in encoders:
            encoder.up, encoder.health = True, 200
        await router.until_up(encode=2)
        encoders[0].behaviours = encoders[1].behaviours = [ENDS[what]]  # the success counts: this is the first loss
        assert (await router.ask(request(picture()))).status == 200


async def test_a_connection_that_ends_without_its_instance_is_no_loss() -> None:
    encoders, (language,) = encoder_stubs(3), language_stubs(1)
    for encoder in encoders:
        encoder.behaviours = [lost()]
    async with routed(*encoders, language) as router:
        assert (await router.ask(request(picture()))).status == 200  # at the fourth try


async def test_what_was_beside_the_poison_is_not_taken_along_again() -> None:
    """Two items are lost with one instance. They are not encoded at the same time at the next one."""
    encoders, (language,) = encoder_stubs(3), language_stubs(1)
    for encoder in encoders[:2]:
        encoder.up = False
    encoders[2].behaviours = [held, ends_when_released]
    async with routed(*encoders, language) as router:
        calls = [router.call(request(picture(content))) for content in (b"one", b"another")]
        await until(lambda: len(encoders[2].requests) == 2)
        encoders[0].up = encoders[1].up = True
        await router.until_up(encode=3)
        encoders[0].behaviours = encoders[1].behaviours = shared = [held, encoded()]
        encoders[2].behaviours = [ends]
        encoders[2].release.set()
        await until(lambda: encoders[0].holding or encoders[1].holding)
        assert len(shared) == 1  # the other one waits
        for encoder in encoders[:2]:
            encoder.release.set()
        assert [(await call.answer()).status for call in calls] == [200, 200]


def item(name: str) -> Item:
    return Item("image", name, "data:,")


async def taken(losses: Losses, name: str) -> bool:
    try:
        async with losses.guarded(item(name)):
            return True
    except ItemError:
        return False


async def test_losses_are_counted_by_instance_and_forgotten_in_time() -> None:
    now = 0.0
    losses = Losses(lambda: now)
    for _ in range(3):  # of one instance, by requests at the same time
        losses.note(item("a"), ("http://one", 1), set())
    assert await taken(losses, "a")
    losses.note(item("a"), ("http://one", 2), set())
    assert not await taken(losses, "a")
    assert await taken(losses, "b")
    now = REMEMBERED_SECONDS - 1
    assert not await taken(losses, "a")
    now = REMEMBERED_SECONDS
    assert await taken(losses, "a")


async def test_only_so_many_losses_are_remembered() -> None:
    losses = Losses(lambda: 0.0)
    for number in range(MAX_REMEMBERED + 1):
        for start in (1, 2):
            losses.note(item(str(number)), ("http://one", start), set())
    assert await taken(losses, "0")
    assert not await taken(losses, "1")


# An instance that answers with 500


def fails_on(*contents: bytes) -> Behaviour:
    """Responds with 500 to these files, and encodes others, for as long as the test lasts."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        stub.behaviours.append(behave)
        part = body["messages"][0]["content"][0]
        sent = part[part["type"]]["url"]
        files = [one[one["type"]]["url"] for content in contents for one in (picture(content), sound(content))]
        bad = sent in files or part["type"] == "video_url"
        return await (refused(500, message="Failed to decode frame 0") if bad else encoded())(stub, body)

    return behave


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("what", ["image", "video", "audio"])
async def test_a_damaged_file_that_healthy_instances_answer_with_500_is_refused(what: str, count: int) -> None:
    encoders, (language,) = encoder_stubs(count), language_stubs(1)
    for encoder in encoders:
        encoder.behaviours = [fails_on(b"damaged")]
    part = {"image": picture(b"damaged"), "video": video(), "audio": sound(b"damaged")}[what]
    async with routed(*encoders, language, language_encodes=True) as router:
        answer = await router.ask(request(picture(b"sound"), part))
        assert (answer.status, answer.error["code"]) == (400, f"{what}_corrupt")
        assert answer.error["param"] == "messages[0].content[1]"
        assert "Failed to decode frame 0" in answer.error["message"]
        assert "x-should-retry" not in answer.headers
        sent = [body["messages"][0]["content"][0] for encoder in encoders for body in encoder.requests]
        assert sum(one[one["type"]]["url"] == part[part["type"]]["url"] for one in sent) == 2
        assert (await router.ask(request(picture(b"sound")))).status == 200
        assert await router.counted("media_refused_total", '{reason="not_encodable"}') == 1
        assert (await router.get("/ready")).json()["workers"]["encode"] == count
    assert language.requests[0]["messages"][0]["content"][0]["type"] == "image_embeds"
    assert len(language.requests) == 1


async def test_an_instance_that_encodes_nothing_is_no_reason_to_blame_the_file() -> None:
    encoders, (language,) = encoder_stubs(3), language_stubs(1)
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [refused(500)] * 9
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.error["code"]) == (502, "worker_failed")
        assert answer.headers["x-should-retry"] == "true"
        for encoder in encoders[:2]:
            encoder.requests.clear()
        encoders[0].behaviours.clear()
        assert (await router.ask(request(picture()))).status == 200


async def test_the_routers_own_picture_is_a_new_one_each_time() -> None:
    from embferry.serve.vllm.probe_items import probe_picture

    one, other = probe_picture(), probe_picture()
    assert one.uuid != other.uuid
    assert one.url != other.url
