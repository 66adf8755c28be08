"""Requests that a language instance gets while their items are still being encoded."""

from __future__ import annotations

import asyncio
import functools
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from embferry.models import grid_rule
from tests.serve.vllm import stubs
from tests.serve.vllm.stubs import (
    FAILED,
    ROLE,
    SHAPE,
    Behaviour,
    Router,
    Stub,
    completion,
    encoded,
    encoder_stubs,
    events_of,
    held,
    language_stubs,
    lost,
    picture,
    refused,
    request,
    streamed,
    text,
    until,
    video,
)

pytestmark = pytest.mark.asyncio

routed = functools.partial(stubs.routed, overlap="pictures")
QWEN = {"field": "image_grid_thw", "patch": 14, "factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
GRID = {"image_grid_thw": [[1, 12, 16]]}
"""The grid of a picture of 224 × 168 pixels."""
OPTIONS: list[dict[str, Any]] = [{"mm_processor_kwargs": {"max_pixels": 5}}, {"media_io_kwargs": {"video": {}}}]


def png(number: int, width: int = 224, height: int = 168) -> dict[str, Any]:
    """Returns a picture that no other number has."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), (number, 0, 0)).save(data, "PNG")
    return picture(data.getvalue())


def offered(**changes: Any) -> Behaviour:
    """Responds as an encoder that says how its model makes grids."""
    return encoded(**{grid_rule.KEY: QWEN, "metadata": GRID, **changes})


def after_hold(behaviour: Behaviour) -> Behaviour:
    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        await stub.hold()
        return await behaviour(stub, body)

    return behave


async def learn(router: Router, encoder: Stub) -> None:
    """Has an encoder answer once, by which the router learns what it needs."""
    encoder.behaviours.insert(0, offered())
    assert (await router.ask(request(png(0), text()))).status == 200


def where(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the coordinates in a request to a language instance."""
    return [entry["embferry"] for entry in body["ec_transfer_params"].values()]


async def counts(router: Router) -> dict[str, float]:
    text = (await router.get("/metrics")).body.decode()
    names = ("used", "unexpected", "failed")
    found = {name: f'embferry_router_overlapped_total{{outcome="{name}"}} ' for name in names}
    lines = text.splitlines()
    return {
        name: float(line.removeprefix(start))
        for name, start in found.items()
        for line in lines
        if line.startswith(start)
    }


async def test_a_language_instance_is_asked_while_the_encoder_runs() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(offered())]
        call = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and len(language.requests) == 2)
        (asked,), encode = where(language.requests[1]), encoder.requests[1]
        (part, _) = language.requests[1]["messages"][0]["content"]
        assert part["image_embeds"] == {"image_grid_thw": [1, 12, 16]}
        assert asked["room"] == encode["ec_transfer_params"]["embferry"]["room"]
        assert asked["endpoint"] == "tcp://enc0:1"
        assert (asked["tokens"], asked["digest"], asked["width"], asked["dtype"]) == (None, None, 64, "float32")
        assert not call.sent, "nothing goes to the client before the encode has ended"
        encoder.release.set()
        assert (await call.answer()).json() == completion("a red circle")
        assert len(language.requests) == 2
        assert await counts(router) == {"used": 1}
        again = await router.ask(request(png(1), text()))
        assert again.status == 200
        assert len(encoder.requests) == 2, "it has arrived, so it is not encoded again"
        assert grid_rule.KEY not in str(language.requests)


async def test_all_pictures_of_a_request_are_announced_at_once() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(offered()), after_hold(offered(metadata={"image_grid_thw": [1, 24, 16]}))]
        call = router.call(request(png(0), png(1), png(2, 224, 336), png(1), text()))
        await until(lambda: len(encoder.requests) == 3 and len(language.requests) == 2)
        known, *new = where(language.requests[1])
        assert (known["endpoint"], known["digest"]) == (None, SHAPE["digest"]), "that one is there"
        assert [one["digest"] for one in new] == [None, None]
        assert len({one["room"] for one in (known, *new)}) == 3
        encoder.release.set()
        assert (await call.answer()).status == 200
        assert await counts(router) == {"used": 1}


UNEXPECTED: dict[str, Behaviour] = {
    "another grid": offered(metadata={"image_grid_thw": [[1, 16, 12]]}),
    "no metadata": offered(metadata={}),
    "another endpoint": offered(embferry={"endpoint": "tcp://enc0:2", "room": 7, **SHAPE}),
}


@pytest.mark.parametrize("answers_first", [False, True])
@pytest.mark.parametrize("kind", UNEXPECTED)
async def test_the_request_is_asked_again_if_an_item_was_encoded_otherwise(kind: str, answers_first: bool) -> None:
    """An answer to what was guessed does not reach the client, whichever of the two is first."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(UNEXPECTED[kind])]
        language.behaviours = [streamed(*events_of("a wrong answer")) if answers_first else held]
        call = router.call(request(png(1), text(), stream=answers_first))
        await until(lambda: encoder.holding and len(language.requests) == 2)
        encoder.release.set()
        answer = await call.answer()
        assert answer.status == 200
        assert b"wrong" not in answer.body
        assert len(encoder.requests) == 2, "the encode counts"
        assert len(language.requests) == 3
        assert where(language.requests[2])[0]["digest"] == SHAPE["digest"]
        assert await counts(router) == {"unexpected": 1}


async def test_an_encode_at_another_encoder_is_announced_again() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [offered(), offered()]
        number = 0
        while not all(encoder.requests for encoder in encoders):  # until the router has learned from both
            number += 1
            await router.ask(request(png(number), text()))
        before, gone = len(language.requests), list[str]()

        async def first_is_lost(stub: Stub, body: dict[str, Any]) -> httpx.Response:
            gone.append(stub.host)
            return await (lost() if len(gone) == 1 else offered())(stub, body)

        for encoder in encoders:
            encoder.behaviours = [first_is_lost]
        language.behaviours = [held]
        answer = await router.ask(request(png(200), text()))
        assert answer.status == 200
        assert len(language.requests) == before + 2
        early, late = (where(body)[0] for body in language.requests[before:])
        assert early["room"] == late["room"], "in the same room"
        assert early["endpoint"] != late["endpoint"]
        assert language.left == 1, "the first call was ended"


FAILING: dict[str, tuple[Behaviour, int]] = {
    "the item is wrong": (refused(400), 400),
    "the encoder has no capacity": (refused(503), 503),
    "the connection ends": (lost(), 503),
}


@pytest.mark.parametrize("kind", FAILING)
async def test_a_failed_encode_ends_the_call_to_the_language_instance(kind: str) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    behaviour, status = FAILING[kind]
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(behaviour), *[behaviour] * 4]
        language.behaviours = [held]
        call = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and language.holding)
        encoder.release.set()
        assert (await call.answer()).status == status
        await until(lambda: language.left == 1)


async def test_the_first_token_waits_for_the_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(refused(400))]
        language.behaviours = [streamed(*events_of("a token too early"))]
        call = router.call(request(png(1), text(), stream=True))
        await until(lambda: encoder.holding and len(language.requests) == 2)
        encoder.release.set()
        answer = await call.answer()
        assert answer.status == 400
        assert b"early" not in answer.body


async def test_a_client_that_leaves_ends_both_calls() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours, language.behaviours = [held], [held]
        call = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and language.holding)
        call.leave()
        await until(lambda: encoder.left == 1 and language.left == 1)


@pytest.mark.parametrize("answer", [refused(400), refused(422)])
async def test_a_refused_request_is_refused(answer: Behaviour) -> None:
    """The encode is waited for: its error would come first, and what was guessed may be the reason."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours, language.behaviours = [after_hold(offered())], [answer]
        call = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and len(language.requests) == 2)
        encoder.release.set()
        assert (await call.answer()).status in (400, 422)
        assert len(language.requests) == 2


async def reported(router: Router, coordinates: dict[str, Any]) -> None:
    body = {"code": "remote_protocol_error", "message": "malformed", "retryable": False}
    told = await router.post(f"/ec/failures/{coordinates['failover_token']}", body)
    assert told.status == 204


async def test_an_embedding_that_does_not_arrive_early_is_announced_after_its_encode() -> None:
    """A consumer of an older version knows no coordinates without a digest. After some failures it gets none."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        for number in range(1, 5):
            encoder.behaviours = [offered()]
            before, is_early = len(language.requests), number < 4

            async def fails(stub: Stub, body: dict[str, Any]) -> httpx.Response:
                await reported(router, where(body)[0])
                return await streamed(ROLE, FAILED)(stub, body)

            language.behaviours = [fails] if is_early else []
            assert (await router.ask(request(png(number), text(), stream=True))).status == 200
            assert [where(body)[0]["digest"] for body in language.requests[before:]] == [None, "00"][not is_early :]
            assert len(encoder.requests) == 1 + number, "its encode counts"
        assert await counts(router) == {"failed": 3}


async def test_a_failure_without_a_report_is_one_of_the_request() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [offered(), offered()]
        language.behaviours = [streamed(ROLE, FAILED)]
        assert (await router.ask(request(png(1), text(), stream=True))).status == 200
        assert [where(body)[0]["digest"] for body in language.requests[1:]] == [None, "00"]
        assert len(encoder.requests) == 3, "the second attempt encodes again"


async def test_a_loss_before_the_encode_has_ended_waits_for_it() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [offered(), offered()]
        number = 0
        while not all(encoder.requests for encoder in encoders):
            number += 1
            await router.ask(request(png(number), text()))
        before = len(language.requests)
        for encoder in encoders:
            encoder.behaviours = [after_hold(offered()), offered()]
        language.behaviours = [held]
        call = router.call(request(png(200), text()))
        await until(lambda: any(encoder.holding for encoder in encoders) and language.holding)
        (early,) = where(language.requests[before])
        body = {"code": "peer_gone", "message": "killed", "endpoint": early["endpoint"]}
        report = asyncio.create_task(router.post(f"/ec/failovers/{early['failover_token']}", body))
        for encoder in encoders:
            encoder.release.set()
        other = (await report).json()["embferry"]
        assert other["room"] == early["room"]
        assert other["endpoint"] != early["endpoint"]
        assert other["digest"] == SHAPE["digest"]
        language.release.set()
        assert (await call.answer()).status == 200


async def test_a_loss_is_not_answered_after_the_request_has_ended() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours, language.behaviours = [after_hold(refused(400))], [held]
        call = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and language.holding)
        (early,) = where(language.requests[1])
        body = {"code": "peer_gone", "message": "killed", "endpoint": early["endpoint"]}
        report = asyncio.create_task(router.post(f"/ec/failovers/{early['failover_token']}", body))
        encoder.release.set()
        assert (await call.answer()).status == 400
        assert (await report).status == 404


@pytest.mark.parametrize("overlap", ["pictures", "all"])
async def test_a_file_that_no_instance_has_decoded_goes_to_a_language_instance_only_if_that_is_wanted(
    overlap: str,
) -> None:
    """A file that ends its decoder would end that instance too."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, overlap=overlap) as router:
        assert (await router.ask(request(video(b"first"), text()))).status == 200
        encoder.behaviours = [held]
        call = router.call(request(video(b"second"), text()))
        await until(lambda: encoder.holding and len(language.requests) == 1 + (overlap == "all"))
        encoder.release.set()
        assert (await call.answer()).status == 200
        assert language.requests[1]["messages"][0]["content"][0]["type"] == "video_url"
        assert where(language.requests[1])[0]["digest"] == (None if overlap == "all" else "00")


@pytest.mark.parametrize("options", OPTIONS)
async def test_options_of_the_processor_are_waited_for(options: dict[str, Any]) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [offered()]
        assert (await router.ask(request(png(1), text(), **options))).status == 200
        assert where(language.requests[1])[0]["digest"] == "00"
        assert await counts(router) == {}


async def test_without_overlap_the_encode_is_waited_for() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, overlap="off") as router:
        await learn(router, encoder)
        encoder.behaviours = [offered()]
        assert (await router.ask(request(png(1), text()))).status == 200
        assert where(language.requests[1])[0]["digest"] == "00"


async def test_a_picture_whose_size_is_unknown_is_waited_for() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [offered()]
        assert (await router.ask(request(png(1), picture(b"another"), text()))).status == 200
        assert [one["digest"] for one in where(language.requests[1])] == ["00", "00"]


async def test_an_item_that_is_encoded_for_another_request_is_waited_for() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.behaviours = [after_hold(offered())]
        first = router.call(request(png(1), text()))
        await until(lambda: encoder.holding and len(language.requests) == 2)
        second = router.call(request(png(1), text()))
        encoder.release.set()
        assert [(await call.answer()).status for call in (first, second)] == [200, 200]
        assert len(encoder.requests) == 2
        early, late = (where(body)[0] for body in language.requests[1:])
        assert (early["digest"], late["digest"]) == (None, "00")


async def test_an_encoder_that_was_started_again_is_learned_anew() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await learn(router, encoder)
        encoder.up = False
        await router.until_up(encode=0)
        encoder.up = True
        await router.until_up(encode=1)
        encoder.behaviours = [offered()]
        assert (await router.ask(request(png(1), text()))).status == 200
        assert where(language.requests[1])[0]["digest"] == "00"
