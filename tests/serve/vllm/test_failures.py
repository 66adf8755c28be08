"""Failures behind the router: where a request is tried again, and what the client gets. No 200 without the picture."""

from __future__ import annotations

import httpx
import pytest

from tests.serve.vllm.stubs import (
    BREAK,
    DONE,
    FAILED,
    HOLD,
    ROLE,
    Behaviour,
    answered,
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
    routed,
    streamed,
    text,
    until,
)

pytestmark = pytest.mark.asyncio


UNUSABLE: dict[str, Behaviour] = {
    "it breaks off": lost(),
    "it cannot be reached": lost(httpx.ConnectError),
    "it takes too long": lost(httpx.ReadTimeout),
    "500": refused(500),
    "it is busy": refused(503),
    "no coordinates": encoded(embferry=None),
    "incomplete coordinates": encoded(embferry={"room": 1}),
    "it refuses the item": encoded(embferry=None, embferry_refused={"code": "capacity_exhausted", "message": "full"}),
    "no parameters": answered(),
}


@pytest.mark.parametrize("what", UNUSABLE)
async def test_a_failed_encode_is_tried_at_another_encoder(what: str) -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language, received_bytes=0) as router:
        for number in range(4):
            for encoder in encoders:
                encoder.requests.clear()
            content = picture(str(number).encode())
            await router.ask(request(content))
            (home,) = (encoder for encoder in encoders if encoder.requests)
            (other,) = (encoder for encoder in encoders if not encoder.requests)
            home.behaviours = [UNUSABLE[what]]
            answer = await router.ask(request(content))
            assert (answer.status, answer.json()) == (200, completion("a red circle"))
            assert len(other.requests) == 1
            await router.until_up(encode=2)
        assert await router.counted("encode_retries_total") == 4


async def test_requests_beyond_the_bytes_are_refused_and_a_large_one_alone_is_not() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, router={"max_held_bytes": 1000}) as router:
        encoder.behaviours = [held]
        large = router.call(request(picture(b"x" * 2000)))
        await until(lambda: encoder.holding)
        assert await router.counted("held_bytes", part="process") > 2000
        refused_now = await router.ask(request(text()))
        assert (refused_now.status, refused_now.headers["retry-after"]) == (503, "1")
        assert refused_now.error["code"] == "capacity_exhausted"
        encoder.release.set()
        assert (await large.answer()).status == 200
        assert await router.counted("held_bytes", part="process") == 0
        assert (await router.ask(request(text()))).status == 200


@pytest.mark.parametrize("role", ["encode", "language"])
async def test_a_refusal_of_the_routers_own_api_key_is_no_fault_of_the_client(role: str) -> None:
    stubs = {"encode": encoder_stubs(1)[0], "language": language_stubs(1)[0]}
    async with routed(*stubs.values(), router={"api_key": "k"}) as router:
        stubs[role].behaviours = [refused(401)] * 9
        answer = await router.ask(request(picture()), authorization="Bearer k")
        assert (answer.status, answer.error["code"]) == (502, "worker_failed")
        assert "refuses the router's API key" in answer.error["message"]


@pytest.mark.parametrize("what", UNUSABLE)
async def test_an_item_that_no_encoder_encodes_is_an_error(what: str) -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [UNUSABLE[what]] * 2
        answer = await router.ask(request(picture()))
    is_fault = what in ("500", "no coordinates", "incomplete coordinates", "no parameters")
    assert (answer.status, answer.error["code"]) == ((502, "worker_failed") if is_fault else (503, "no_worker"))
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    assert "http://enc0" in answer.error["message"]
    assert "http://enc1" in answer.error["message"]
    # An encoder that broke off and answers again may have been restarted, so it is tried once more.
    tries = 2 if what in ("it breaks off", "it cannot be reached") else 1
    more = 1 if what == "500" else 0  # with a picture of the router's own
    assert sorted(len(encoder.requests) for encoder in encoders) == [tries, tries + more]
    assert language.requests == []


async def test_without_encoders_only_text_is_answered() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.up = False
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert answer.headers["retry-after"] == "1"
        assert "connection refused" in answer.error["message"]
        assert (await router.ask(request(text()))).status == 200
        (model,) = (await router.get("/v1/models")).json()["data"]
        assert (await router.ask({**request(text()), "model": model["id"]})).status == 200
        ready = await router.get("/ready")
        assert ready.status == 503
        assert "no encode instance" in ready.json()["missing"][0]
        encoder.up = True
        assert (await router.ask(request(picture()))).status == 200


async def test_without_any_instance_a_question_that_names_no_model_is_told_so() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.up = language.up = False
    async with routed(encoder, language) as router:
        assert (await router.get("/v1/models")).json()["data"] == []
        without = {name: value for name, value in request(text()).items() if name != "model"}
        for asked in (without, request(text())):
            answer = await router.ask(asked)
            assert (answer.status, answer.error["code"]) == (503, "no_worker")


async def test_an_instances_4xx_passes_unchanged() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
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


async def test_the_first_bad_item_cancels_the_others() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
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
    "stream: abort": (True, streamed(ROLE, events_of("", "abort")[1], DONE)),
    "stream: lost before a token": (True, streamed(ROLE, BREAK)),
    "stream: only comments": (True, streamed(b": ping\n\n", b": ping\n\n")),
}


@pytest.mark.parametrize("what", GIVEN_UP)
async def test_a_failure_behind_the_encode_is_encoded_again_elsewhere(what: str) -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    stream, behaviour = GIVEN_UP[what]
    async with routed(*encoders, language) as router:
        language.behaviours = [behaviour]
        answer = await router.ask(request(picture(), stream=stream))
        assert answer.status == 200
        assert b"red" in answer.body
        is_lost = ": lost" in what  # and answers again: then the embedding is as good as before
        assert sorted(len(encoder.requests) for encoder in encoders) == ([0, 1] if is_lost else [1, 1])
        assert await router.counted("chat_second_attempts_total") == 1


@pytest.mark.parametrize("what", GIVEN_UP)
async def test_a_second_failure_behind_the_encode_is_an_error(what: str) -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    stream, behaviour = GIVEN_UP[what]
    async with routed(*encoders, language) as router:
        language.behaviours = [behaviour, behaviour]
        answer = await router.ask(request(picture(), stream=stream))
        expected = (503, "no_worker") if what.endswith(": lost") else (502, "worker_failed")
        if what.endswith(": lost"):  # depends on whether the instance has been found again
            assert answer.status in (502, 503)
        else:
            assert (answer.status, answer.error["code"]) == expected
            assert len(language.requests) == 2
        assert "before that" in answer.error["message"]


async def test_an_instance_without_embeddings_is_reported_as_misconfigured() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    why = "You must set `--enable-mm-embeds` to input `image_embeds` (parameter=image_embeds)"
    language.behaviours = [refused(400, message=why)]
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(picture()))
    assert (answer.status, answer.error["code"]) == (502, "worker_failed")
    assert "is it started as ec_consumer" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert len(language.requests) == 1


async def test_another_language_instance_takes_over() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
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
            assert len(encoder.requests) == 1  # the embedding is still there
            await router.until_up(language=2)


async def test_an_embedding_pushed_to_one_instance_is_encoded_again_for_another() -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
    addresses = ("tcp://10.0.0.1:1", "tcp://10.0.0.2:1")
    async with routed(encoder, *languages, connector="mooncake", consumer_zmq=addresses) as router:
        languages[0].behaviours = languages[1].behaviours = shared = [lost(httpx.ConnectError)]
        assert (await router.ask(request(picture()))).status == 200
        assert shared == []
    told = [body["ec_transfer_params"]["consumer_zmq"] for body in encoder.requests]
    assert sorted(told) == sorted(addresses)


@pytest.mark.parametrize("status", [429, 503])
async def test_when_all_language_instances_are_busy_their_refusal_passes(status: int) -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
    languages[0].behaviours = languages[1].behaviours = [refused(status), refused(status)]
    async with routed(encoder, *languages) as router:
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.headers["retry-after"]) == (status, "1")


async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    role, first, *_ = events_of("one two")
    for broken in (streamed(role, first, BREAK), streamed(role, first)):
        language.behaviours = [broken]
        async with routed(encoder, language) as router:
            answer = await router.ask(request(picture(), stream=True))
        assert answer.status == 200
        assert answer.body.startswith(role + first + b'data: {"error":{"message":"the language instance broke off')
        assert DONE not in answer.body


async def test_an_error_event_after_the_first_token_passes_unchanged() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    events = [*events_of("one two")[:2], FAILED, DONE]
    language.behaviours = [streamed(*events)]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture(), stream=True))).body == b"".join(events)


@pytest.mark.parametrize("where", ["encode", "language", "stream"])
async def test_when_the_client_leaves_the_instances_are_released(where: str) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    role, first, *_ = events_of("one")
    if where == "encode":
        encoder.behaviours = [held]
    else:
        language.behaviours = [held if where == "language" else streamed(role, first, HOLD)]
    waits = encoder if where == "encode" else language
    async with routed(encoder, language) as router:
        call = router.call(request(picture(), stream=where == "stream"))
        await until(lambda: waits.requests)
        if where == "stream":
            await call.until(lambda: len(call.sent) >= 2)
        call.leave()
        await call.task
        assert waits.left == 1
        assert await router.counted("chat_aborted_total") == 1
        assert await router.counted("chat_in_flight") == 0


@pytest.mark.parametrize("where", ["encode", "language", "stream"])
async def test_a_request_has_a_time_limit(where: str) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    role, first, *_ = events_of("one")
    if where == "encode":
        encoder.behaviours = [held]
    else:
        language.behaviours = [held if where == "language" else streamed(role, first, HOLD)]
    async with routed(encoder, language, router={"request_timeout": 1}) as router:
        answer = await router.ask(request(picture(), stream=where == "stream"))
    if where == "stream":
        assert answer.status == 200
        assert b'"code":"request_timeout"' in answer.body
    else:
        assert (answer.status, answer.error["code"]) == (504, "request_timeout")
    assert (encoder if where == "encode" else language).left == 1


async def test_without_encoders_a_language_instance_may_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.up = False
    async with routed(encoder, language, language_encodes=True) as router:
        assert (await router.ask(request(picture(uuid="theirs"), text()))).status == 200
        assert await router.counted("fallbacks_total") == 1
    (sent,) = language.requests
    (part, _) = sent["messages"][0]["content"]
    assert part == picture(uuid=part["uuid"])
    assert len(part["uuid"]) == 64
    assert "ec_transfer_params" not in sent


async def test_after_a_failed_transfer_a_language_instance_may_encode() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language, language_encodes=True) as router:
        language.behaviours = [refused(500), refused(500)]
        assert (await router.ask(request(picture()))).status == 200
        language.behaviours = [refused(400)]
        assert (await router.ask(request(picture()))).status == 400  # the request itself is wrong
        assert await router.counted("fallbacks_total") == 1


async def test_the_router_refuses_bad_requests_itself() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
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
        assert await router.counted("chat_errors_total", '{code="unsupported_value"}') == 2
    assert encoder.requests + language.requests == []
