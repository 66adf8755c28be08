"""What goes wrong behind the router: where it is tried again, and what the client is told. No 200 without the image."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.serve.vllm.stubs import (
    BREAK,
    DONE,
    FAILED,
    HOLD,
    ROLE,
    Behaviour,
    Stub,
    answered,
    completion,
    encoded,
    held,
    lost,
    picture,
    refused,
    request,
    routed,
    streamed,
    text,
    told,
)

pytestmark = pytest.mark.asyncio


def stubs(encoders: int = 2, languages: int = 1) -> tuple[list[Stub], list[Stub]]:
    return (
        [Stub(f"enc{number}", "encode") for number in range(encoders)],
        [Stub(f"lang{number}", "language") for number in range(languages)],
    )


UNFIT: dict[str, Behaviour] = {
    "it breaks off": lost(),
    "it cannot be reached": lost(httpx.ConnectError),
    "it takes too long": lost(httpx.ReadTimeout),
    "500": refused(500),
    "it is busy": refused(503),
    "no coordinates": encoded(embferry=None),
    "coordinates without a place": encoded(embferry={"room": 1}),
    "no room for it": encoded(embferry=None, embferry_refused={"code": "capacity_exhausted", "message": "full"}),
    "no parameters": answered(),
}


@pytest.mark.parametrize("what", UNFIT)
async def test_a_failed_encode_is_tried_elsewhere(what: str) -> None:
    encoders, (language,) = stubs()
    async with routed(*encoders, language, received_bytes=0) as router:
        for number in range(4):
            for encoder in encoders:
                encoder.requests.clear()
            content = picture(str(number).encode())
            await router.ask(request(content))
            (home,) = (encoder for encoder in encoders if encoder.requests)
            (other,) = (encoder for encoder in encoders if not encoder.requests)
            home.behaviours = [UNFIT[what]]
            answer = await router.ask(request(content))
            assert (answer.status, answer.json()) == (200, completion("a red circle"))
            assert len(other.requests) == 1
            await _all_up(router, 2)
        assert await router.counted("encode_retries_total") == 4


async def _all_up(router: Any, encoders: int) -> None:
    async with asyncio.timeout(5):
        while (await router.get("/ready")).json()["workers"]["encode"] != encoders:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("what", UNFIT)
async def test_when_no_encoder_can(what: str) -> None:
    encoders, (language,) = stubs()
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [UNFIT[what]] * 2
        answer = await router.ask(request(picture()))
    is_fault = what in ("500", "no coordinates", "coordinates without a place", "no parameters")
    assert (answer.status, answer.error["code"]) == ((502, "worker_failed") if is_fault else (503, "no_worker"))
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers.get("retry-after") == (None if is_fault else "1")
    assert "http://enc0" in answer.error["message"]
    assert "http://enc1" in answer.error["message"]
    # One that was lost and is there again when all have been tried has been started again, for all one can know.
    tries = 2 if what in ("it breaks off", "it cannot be reached") else 1
    assert [len(encoder.requests) for encoder in encoders] == [tries, tries]
    assert language.requests == []


async def test_all_encoders_are_down() -> None:
    (encoder,), (language,) = stubs(1)
    encoder.up = False
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert answer.headers["retry-after"] == "1"
        assert "connection refused" in answer.error["message"]
        assert (await router.ask(request(text()))).status == 200
        ready = await router.get("/ready")
        assert ready.status == 503
        assert "no encode instance" in ready.json()["missing"][0]
        encoder.up = True
        assert (await router.ask(request(picture()))).status == 200


async def test_what_is_the_clients_fault_goes_back_as_it_is() -> None:
    encoders, (language,) = stubs()
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [refused(400, message="cannot identify image file")]
        answer = await router.ask(request(picture()))
        assert answer.status == 400
        assert answer.error == {"message": "cannot identify image file", "type": "x", "code": 400}
        assert sum(len(encoder.requests) for encoder in encoders) == 1
        encoders[0].behaviours = encoders[1].behaviours = []
        language.behaviours = [refused(400, message="longer than the maximum model length")]
        assert (await router.ask(request(picture(), stream=True))).error["message"].startswith("longer")
        assert len(language.requests) == 1


async def test_the_first_bad_item_ends_the_others() -> None:
    (encoder,), (language,) = stubs(1)
    encoder.behaviours = [held, refused(415)]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture(b"1"), picture(b"2")))).status == 415
        assert encoder.left == 1


GIVEN_UP: dict[str, tuple[bool, Behaviour]] = {
    "whole: 500": (False, refused(500)),
    "whole: error": (False, answered("", "error")),
    "whole: abort": (False, answered("a red", "abort")),
    "whole: lost": (False, lost()),
    "whole: nonsense": (False, encoded(embferry=None)),
    "stream: 500": (True, refused(500)),
    "stream: lost": (True, lost()),
    "stream: error event": (True, streamed(ROLE, FAILED, DONE)),
    "stream: error event at once": (True, streamed(FAILED, DONE)),
    "stream: nothing": (True, streamed()),
    "stream: no token": (True, streamed(ROLE, DONE)),
    "stream: abort": (True, streamed(ROLE, told("", "abort")[1], DONE)),
    "stream: lost before a token": (True, streamed(ROLE, BREAK)),
    "stream: only comments": (True, streamed(b": ping\n\n", b": ping\n\n")),
}


@pytest.mark.parametrize("what", GIVEN_UP)
async def test_a_failure_behind_the_encode_is_encoded_again_elsewhere(what: str) -> None:
    encoders, (language,) = stubs()
    stream, behaviour = GIVEN_UP[what]
    async with routed(*encoders, language) as router:
        language.behaviours = [behaviour]
        answer = await router.ask(request(picture(), stream=stream))
        assert answer.status == 200
        assert b"red" in answer.body
        assert [len(encoder.requests) for encoder in encoders] == [1, 1]
        assert await router.counted("second_attempts_total") == 1


@pytest.mark.parametrize("what", GIVEN_UP)
async def test_a_failure_behind_the_encode_is_no_200(what: str) -> None:
    encoders, (language,) = stubs()
    stream, behaviour = GIVEN_UP[what]
    async with routed(*encoders, language) as router:
        language.behaviours = [behaviour, behaviour]
        answer = await router.ask(request(picture(), stream=stream))
        expected = (503, "no_worker") if what.endswith(": lost") else (502, "worker_failed")
        if what.endswith(": lost"):  # the instance is found again at once, so it is asked twice, or not at all
            assert answer.status in (502, 503)
        else:
            assert (answer.status, answer.error["code"]) == expected
            assert len(language.requests) == 2
        assert "before that" in answer.error["message"]


async def test_an_instance_that_takes_no_embeddings_is_said_to_be_so() -> None:
    encoders, (language,) = stubs()
    why = "You must set `--enable-mm-embeds` to input `image_embeds` (parameter=image_embeds)"
    language.behaviours = [refused(400, message=why)]
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(picture()))
    assert (answer.status, answer.error["code"]) == (502, "worker_failed")
    assert "is it started as ec_consumer" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert len(language.requests) == 1


async def test_another_language_instance_takes_over() -> None:
    (encoder,), languages = stubs(1, 2)
    async with routed(encoder, *languages) as router:
        for number, behaviour in enumerate((lost(httpx.ConnectError), refused(503), refused(429))):
            for language in languages:
                language.requests.clear()
                language.behaviours.clear()
            encoder.requests.clear()
            languages[0].behaviours = languages[1].behaviours = shared = [behaviour]
            assert (await router.ask(request(picture(str(number).encode())))).status == 200
            assert shared == []
            assert [len(language.requests) for language in languages] == [1, 1]
            assert len(encoder.requests) == 1  # what was encoded is still there
            await asyncio.sleep(0.03)


async def test_what_was_pushed_to_one_instance_is_encoded_again_for_another() -> None:
    (encoder,), languages = stubs(1, 2)
    addresses = ("tcp://10.0.0.1:1", "tcp://10.0.0.2:1")
    async with routed(encoder, *languages, connector="mooncake", consumer_zmq=addresses) as router:
        languages[0].behaviours = languages[1].behaviours = shared = [lost(httpx.ConnectError)]
        assert (await router.ask(request(picture()))).status == 200
        assert shared == []
    told = [body["ec_transfer_params"]["consumer_zmq"] for body in encoder.requests]
    assert sorted(told) == sorted(addresses)


async def test_all_language_instances_are_busy() -> None:
    (encoder,), languages = stubs(1, 2)
    languages[0].behaviours = languages[1].behaviours = [refused(429), refused(429)]
    async with routed(encoder, *languages) as router:
        assert (await router.ask(request(picture()))).status == 429


async def test_a_stream_that_breaks_ends_with_an_error() -> None:
    (encoder,), (language,) = stubs(1)
    role, first, *_ = told("one two")
    for broken in (streamed(role, first, BREAK), streamed(role, first)):
        language.behaviours = [broken]
        async with routed(encoder, language) as router:
            answer = await router.ask(request(picture(), stream=True))
        assert answer.status == 200
        assert answer.body.startswith(role + first + b'data: {"error":{"message":"the language instance broke off')
        assert DONE not in answer.body


async def test_an_error_of_vllm_in_the_middle_passes_as_it_is() -> None:
    (encoder,), (language,) = stubs(1)
    events = [*told("one two")[:2], FAILED, DONE]
    language.behaviours = [streamed(*events)]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture(), stream=True))).body == b"".join(events)


@pytest.mark.parametrize("where", ["encode", "language", "stream"])
async def test_a_client_that_leaves_ends_the_work(where: str) -> None:
    (encoder,), (language,) = stubs(1)
    role, first, *_ = told("one")
    if where == "encode":
        encoder.behaviours = [held]
    else:
        language.behaviours = [held if where == "language" else streamed(role, first, HOLD)]
    waits = encoder if where == "encode" else language
    async with routed(encoder, language) as router:
        call = router.call(request(picture(), stream=where == "stream"))
        async with asyncio.timeout(5):
            while not waits.requests:
                await asyncio.sleep(0)
        if where == "stream":
            await call.until(lambda: len(call.sent) >= 2)
        call.leave()
        async with asyncio.timeout(5):
            await call.task
        assert waits.left == 1
        assert await router.counted("aborted_total") == 1
        assert await router.counted("in_flight") == 0


@pytest.mark.parametrize("where", ["encode", "language", "stream"])
async def test_a_request_has_its_time(where: str) -> None:
    (encoder,), (language,) = stubs(1)
    role, first, *_ = told("one")
    if where == "encode":
        encoder.behaviours = [held]
    else:
        language.behaviours = [held if where == "language" else streamed(role, first, HOLD)]
    async with routed(encoder, language, router={"request_timeout": 0.4}) as router:
        answer = await router.ask(request(picture(), stream=where == "stream"))
    if where == "stream":
        assert answer.status == 200
        assert b'"code":"request_timeout"' in answer.body
    else:
        assert (answer.status, answer.error["code"]) == (504, "request_timeout")
    assert (encoder if where == "encode" else language).left == 1


async def test_without_encoders_a_language_instance_can_do_it_all() -> None:
    (encoder,), (language,) = stubs(1)
    encoder.up = False
    async with routed(encoder, language, language_encodes=True) as router:
        assert (await router.ask(request(picture(uuid="theirs"), text()))).status == 200
        assert await router.counted("fallbacks_total") == 1
    (sent,) = language.requests
    (part, _) = sent["messages"][0]["content"]
    assert part == picture(uuid=part["uuid"])
    assert len(part["uuid"]) == 64
    assert "ec_transfer_params" not in sent


async def test_a_transfer_that_fails_for_good_can_be_done_without() -> None:
    encoders, (language,) = stubs()
    async with routed(*encoders, language, language_encodes=True) as router:
        language.behaviours = [refused(500), refused(500)]
        assert (await router.ask(request(picture()))).status == 200
        language.behaviours = [refused(400)]
        assert (await router.ask(request(picture()))).status == 400  # the request's own fault
        assert await router.counted("fallbacks_total") == 1


async def test_what_the_router_itself_refuses() -> None:
    (encoder,), (language,) = stubs(1)
    async with routed(encoder, language, router={"max_body_bytes": 2000}) as router:
        for body, status, code in (
            (request(text(), ec_transfer_params={}), 400, "unsupported_value"),
            (request({"type": "image_embeds", "image_embeds": {}}), 400, "unsupported_value"),
            (b"{", 400, "invalid_json"),
            (request(text("x" * 3000)), 413, "body_too_large"),
        ):
            answer = await router.ask(body)
            assert (answer.status, answer.error["code"]) == (status, code)
        assert (await router.get("/nothing")).error["code"] == "not_found"
        assert (await router.get("/v1/chat/completions")).error["code"] == "method_not_allowed"
        assert await router.counted("failures_total", '{code="unsupported_value"}') == 2
    assert encoder.requests + language.requests == []
