"""Prefill and decode at two instances: what each gets, and what happens when one fails."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.serve.vllm.losses import damaged
from tests.serve.vllm.stage_stubs import blocks, stages
from tests.serve.vllm.stubs import (
    BREAK,
    DONE,
    FAILED,
    HOLD,
    ROLE,
    Answer,
    Behaviour,
    Router,
    Stub,
    answered,
    completion,
    encoder_stubs,
    events_of,
    held,
    lost,
    picture,
    refused,
    request,
    routed,
    streamed,
    text,
    until,
    video,
)

pytestmark = pytest.mark.asyncio

ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
CONTENTS = {"text": (text(),), "picture": (picture(), text()), "video": (video(), picture(), text())}


def requests_of(stubs: list[Stub]) -> list[dict[str, Any]]:
    return [body for stub in stubs for body in stub.requests]


async def ask(router: Router, *content: Any, **more: Any) -> Answer:
    return await router.ask(request(*content, **more))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
async def test_a_request_is_prefilled_and_then_decoded(what: str, stream: bool) -> None:
    encoders, (prefill,), (decode,) = stages()
    async with routed(*encoders, prefill, decode) as router:
        answer = await ask(router, *CONTENTS[what], stream=stream, temperature=0)
        assert answer.status == 200
        if stream:
            assert answer.body == b"".join(events_of("a red circle"))
        else:
            assert answer.json() == completion("a red circle")  # usage and finish_reason of the decode
        assert await router.counted("prefill_call_seconds_count") == 1
    (first,), (second,) = prefill.requests, decode.requests
    assert (first.pop("kv_transfer_params"), blocks(second)) == (ASKED, ("pre0", 1))
    assert (first.pop("max_tokens"), first.pop("stream"), second.pop("stream")) == (1, False, stream)
    del second["kv_transfer_params"]
    assert first == second  # the same prompt, and the same coordinates of its embeddings
    assert len(first.get("ec_transfer_params", ())) == len(CONTENTS[what]) - 1
    assert prefill.left == decode.left == 0


async def test_a_prefill_has_no_field_that_concerns_the_answer() -> None:
    _, (prefill,), (decode,) = stages()
    fields = {
        "max_tokens": 1,
        "max_completion_tokens": 5,
        "min_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "echo": True,
    }
    kept = {"seed": 7, "temperature": 0.5, "stop": ["x"], "response_format": {"type": "json_object"}, "priority": 1}
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        assert (await ask(router, text(), **fields, **kept)).status == 200
    (first,), (second,) = prefill.requests, decode.requests
    shared = {"model": "tiny", "messages": second["messages"], **kept}
    assert first == {**shared, "max_tokens": 1, "stream": False, "kv_transfer_params": ASKED}
    assert second == {**shared, **fields, "kv_transfer_params": second["kv_transfer_params"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", [{"n": 2}, {"n": "2"}, {"prompt_logprobs": 0}, {"use_beam_search": True}], ids=str)
async def test_what_cannot_be_divided_is_answered_by_a_prefill_instance(field: dict[str, Any], stream: bool) -> None:
    _, (prefill,), (decode,) = stages()
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        assert (await ask(router, picture(), text(), stream=stream, **field)).status == 200
    (only,) = prefill.requests
    assert "kv_transfer_params" not in only
    assert {**only, **field, "stream": stream} == only
    assert decode.requests == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/tokenize", "/detokenize"])
async def test_the_other_paths_are_answered_by_a_prefill_instance(path: str) -> None:
    _, (prefill,), (decode,) = stages()
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        assert (await router.call({"model": "tiny", "prompt": "x"}, path).answer()).status == 200
    assert (len(prefill.requests), decode.requests) == (1, [])


async def test_a_body_with_a_byte_order_mark_is_prefilled() -> None:
    _, (prefill,), (decode,) = stages()
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        body = b"\xef\xbb\xbf" + json.dumps(request(text())).encode()
        assert (await router.ask(body)).status == 200
    assert len(prefill.requests) == len(decode.requests) == 1


async def test_a_repeated_picture_goes_to_the_prefill_instance_that_has_it() -> None:
    (encoder,), prefills, (decode,) = stages(prefills=2)
    async with routed(encoder, *prefills, decode) as router:
        for _ in range(3):
            assert (await ask(router, picture(), text())).status == 200
        assert await router.counted("encodes_skipped_total") == 2
    assert len(encoder.requests) == 1
    assert sorted(len(prefill.requests) for prefill in prefills) == [0, 3]
    for body in requests_of(prefills)[1:] + decode.requests[1:]:  # a decode instance that needs it asks the router
        ((_, entry),) = body["ec_transfer_params"].items()
        assert entry["embferry"]["endpoint"] is None
        assert entry["embferry"]["failover_token"]


async def test_the_roles_are_shown() -> None:
    (encoder,), (prefill,), decodes = stages(decodes=2)
    async with routed(encoder, prefill, *decodes) as router:
        ready = await router.get("/ready")
        assert (ready.status, ready.json()["workers"]) == (200, {"encode": 1, "prefill": 1, "decode": 2})
        for role, count in ready.json()["workers"].items():
            assert await router.counted("workers", f'{{role="{role}"}}') == count
        known = (await router.get("/workers")).json()["workers"]
        assert [(one["role"], one["url"]) for one in known] == [
            ("encode", encoder.url),
            ("prefill", prefill.url),
            *(("decode", decode.url) for decode in decodes),
        ]
        roles = [group["labels"]["part"] for group in (await router.get("/sd")).json()]
        assert sorted(roles) == ["decode", "decode", "encode", "prefill", "router"]


@pytest.mark.parametrize("role", ["encode", "prefill", "decode"])
async def test_a_router_without_an_instance_of_a_role_is_not_ready(role: str) -> None:
    stubs = {stub.role: stub for group in stages() for stub in group}
    stubs[role].up = False
    async with routed(*stubs.values()) as router:
        ready = await router.get("/ready")
        assert ready.status == 503
        assert ready.json()["missing"] == [f"no {role} instance answers: {stubs[role].url} connection refused"]
        answer = await ask(router, picture())
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert re.search(rf"no {role} instance .*: {stubs[role].url} connection refused", answer.error["message"])
        assert answer.headers["retry-after"] == "1"
        texts = await ask(router, text())
        assert texts.status == (200 if role == "encode" else 503)
        assert len((await router.get("/v1/models")).json()["data"]) == (1 if role == "encode" else 0)


@pytest.mark.parametrize("what", CONTENTS)
async def test_nothing_is_computed_for_a_request_that_no_decode_instance_can_answer(what: str) -> None:
    """The blocks of a prefill that nothing fetches are kept for minutes, and fill the prefill instance."""
    (encoder,), (prefill,), decodes = stages(decodes=2)
    for decode in decodes:
        decode.up = False
    async with routed(encoder, prefill, *decodes) as router:
        for _ in range(3):
            answer = await ask(router, *CONTENTS[what])
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert (encoder.requests, prefill.requests) == ([], [])
        assert (await ask(router, *CONTENTS[what], n=2)).status == 200  # a prefill instance answers it alone
        decodes[1].up = True
        assert (await ask(router, *CONTENTS[what])).status == 200
    assert len(decodes[1].requests) == 1


async def test_instances_of_different_models_are_reported() -> None:
    _, (prefill,), (decode,) = stages()
    decode.models = ("other",)
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        (missing,) = (await router.get("/ready")).json()["missing"]
        assert missing.startswith("no model is served by an encode, a prefill and a decode instance: ")
        assert (await router.get("/v1/models")).json()["data"] == []
        answer = await ask(router, picture())
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "is served by encode and prefill instances (http://enc0, http://pre0)" in answer.error["message"]
        assert "by no decode instance" in answer.error["message"]
        answer = await ask(router, text())
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert answer.error["message"] == "no decode instance is available: none serves the model"


FAILING: dict[str, Behaviour] = {
    "it arrives damaged": damaged,
    "500": refused(500),
    "it is busy": refused(503),
    "it breaks off": lost(),
    "it takes too long": lost(httpx.ReadTimeout),
    "it gives up": answered(reason="error"),
    "no completion": streamed(),
}
STREAM_FAILING: dict[str, Behaviour] = {
    "an error event": streamed(ROLE, FAILED),
    "it ends before the first token": streamed(ROLE, DONE),
    "it breaks off": streamed(ROLE, BREAK),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
async def test_a_decode_instance_that_cannot_be_reached_is_replaced(what: str, stream: bool) -> None:
    encoders, prefills, decodes = stages(prefills=2, decodes=3)
    async with routed(*encoders, *prefills, *decodes) as router:
        shared = [lost(httpx.ConnectError), lost(httpx.ConnectTimeout)]
        for decode in decodes:
            decode.behaviours = shared
        answer = await ask(router, *CONTENTS[what], stream=stream)
        assert answer.status == 200
        assert await router.counted("chat_second_attempts_total") == 0
    assert len(requests_of(prefills)) == 1
    assert [len(decode.requests) for decode in decodes] == [1, 1, 1]
    assert len({blocks(body) for body in requests_of(decodes)}) == 1  # they have not been fetched


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("failure", [*FAILING, *(f"stream: {name}" for name in STREAM_FAILING)])
async def test_a_failed_decode_is_prefilled_again(failure: str, what: str) -> None:
    encoders, prefills, decodes = stages(prefills=2, decodes=2)
    stream = failure.startswith("stream")
    behaviour = STREAM_FAILING[failure.removeprefix("stream: ")] if stream else FAILING[failure]
    async with routed(*encoders, *prefills, *decodes) as router:
        shared = [behaviour]
        for decode in decodes:
            decode.behaviours = shared
        answer = await ask(router, *CONTENTS[what], stream=stream)
        assert answer.status == 200
        assert await router.counted("chat_second_attempts_total") == 1
        assert await router.counted("encode_retries_total") == 0
    for stubs in (prefills, decodes):  # elsewhere, where there is an elsewhere
        assert [len(stub.requests) for stub in stubs] == [1, 1]
    assert len({blocks(body) for body in requests_of(decodes)}) == 2
    assert len(requests_of(encoders)) == len(CONTENTS[what]) - 1


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("failure", [*FAILING, *(f"stream: {name}" for name in STREAM_FAILING)])
async def test_a_decode_that_fails_twice_is_an_error_with_both_reasons(failure: str, what: str) -> None:
    encoders, (prefill,), (decode,) = stages()
    stream = failure.startswith("stream")
    behaviour = STREAM_FAILING[failure.removeprefix("stream: ")] if stream else FAILING[failure]
    async with routed(*encoders, prefill, decode) as router:
        decode.behaviours = [behaviour] * 2
        answer = await ask(router, *CONTENTS[what], stream=stream)
        told = {"it is busy": (503, "no_worker"), "it arrives damaged": (502, "network_damage")}
        assert (answer.status, answer.error["code"]) == told.get(failure, (502, "worker_failed"))
        assert " (before that: " in answer.error["message"]
        assert answer.headers["x-should-retry"] == "true"
    assert len(prefill.requests) == len(decode.requests) == 2
    assert len({blocks(body) for body in decode.requests}) == 2
    assert len(requests_of(encoders)) == len(CONTENTS[what]) - 1  # no encoder is to blame


async def test_a_decode_instance_that_ends_is_named() -> None:
    encoders, prefills, (decode,) = stages()

    async def end(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        stub.up = False
        return await lost()(stub, body)

    async with routed(*encoders, *prefills, decode) as router:
        decode.behaviours = [end]
        answer = await ask(router, picture())
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert "no decode instance is available: http://dec0 connection refused" in answer.error["message"]
        assert "(before that: the decode instance at http://dec0: connection reset)" in answer.error["message"]


async def test_a_stream_that_breaks_off_after_its_first_token_ends_with_the_reason() -> None:
    encoders, prefills, decodes = stages(decodes=2)
    async with routed(*encoders, *prefills, *decodes) as router:
        shared = [streamed(*events_of("a red")[:-2], BREAK)]
        for decode in decodes:
            decode.behaviours = shared
        answer = await ask(router, picture(), stream=True)
        assert answer.status == 200
        assert b"connection reset" in answer.body
        assert DONE not in answer.body
    assert len(requests_of(decodes)) == 1


async def test_a_decode_instance_that_stalls_is_passed_over() -> None:
    encoders, (prefill,), decodes = stages(decodes=2)
    async with routed(*encoders, prefill, *decodes) as router:
        shared = [streamed(ROLE, HOLD)]
        for decode in decodes:
            decode.behaviours = shared
        call = router.call(request(picture(), stream=True))
        await until(lambda: any(decode.holding for decode in decodes))
        (stalled,) = (decode for decode in decodes if decode.holding)
        stalled.silent = True
        assert (await call.answer()).body.endswith(DONE)
        assert stalled.left == 1
    assert len({blocks(body) for body in requests_of(decodes)}) == 2  # it may fetch its blocks later


async def test_a_refusal_of_the_decode_reaches_the_client() -> None:
    encoders, (prefill,), (decode,) = stages()
    async with routed(*encoders, prefill, decode) as router:
        decode.behaviours = [refused(400, param="temperature")]
        answer = await ask(router, picture(), temperature=-1)
        assert (answer.status, answer.error["param"]) == (400, "temperature")
    assert len(prefill.requests) == len(decode.requests) == 1


@pytest.mark.parametrize("failure", ["500", "it breaks off", "it gives up"])
@pytest.mark.parametrize("what", CONTENTS)
async def test_a_failed_prefill_is_made_elsewhere(what: str, failure: str) -> None:
    encoders, prefills, (decode,) = stages(prefills=2, encoders=2)
    async with routed(*encoders, *prefills, decode) as router:
        shared = [FAILING[failure]]
        for prefill in prefills:
            prefill.behaviours = shared
        assert (await ask(router, *CONTENTS[what])).status == 200
        assert await router.counted("chat_second_attempts_total") == 1
    assert [len(prefill.requests) for prefill in prefills] == [1, 1]
    assert len(decode.requests) == 1
    items = len(CONTENTS[what]) - 1
    again = 0 if failure == "it breaks off" else items  # encoded again, elsewhere, unless the prefill instance is lost
    assert sum(len(encoder.requests) for encoder in encoders) == items + again


@pytest.mark.parametrize("what", CONTENTS)
async def test_a_prefill_that_fails_twice_is_an_error_with_both_reasons(what: str) -> None:
    encoders, (prefill,), (decode,) = stages()
    async with routed(*encoders, prefill, decode) as router:
        prefill.behaviours = [refused(500)] * 2
        answer = await ask(router, *CONTENTS[what])
        assert (answer.status, answer.error["code"]) == (502, "worker_failed")
        assert answer.error["message"].count("the prefill instance at http://pre0 failed with status 500") == 2
    assert decode.requests == []


@pytest.mark.parametrize("params", [None, {"do_remote_prefill": False}, "x"], ids=repr)
async def test_a_prefill_instance_without_a_kv_connector_is_an_error(params: Any) -> None:
    _, (prefill,), (decode,) = stages()

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json={**completion("a", "length"), "kv_transfer_params": params})

    prefill.default = behave
    async with routed(*encoder_stubs(1), prefill, decode) as router:
        answer = await ask(router, picture())
        assert (answer.status, answer.error["code"]) == (502, "worker_failed")
        assert "is it started with NixlConnector, as kv_producer?" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
    assert (len(prefill.requests), decode.requests) == (1, [])


async def test_without_encoders_a_prefill_instance_encodes_if_it_may() -> None:
    (encoder,), (prefill,), (decode,) = stages()
    encoder.up = False
    async with routed(encoder, prefill, decode, language_encodes=True) as router:
        assert (await ask(router, picture())).status == 200
        assert await router.counted("fallbacks_total") == 1
    for body in (*prefill.requests, *decode.requests):
        assert body["messages"][0]["content"][0]["type"] == "image_url"
        assert "ec_transfer_params" not in body


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_work_ends_when_the_client_leaves(role: str) -> None:
    stubs = {stub.role: stub for group in stages() for stub in group}
    async with routed(*stubs.values()) as router:
        stubs[role].behaviours = [held]
        call = router.call(request(picture()))
        await until(lambda: stubs[role].holding)
        call.leave()
        await call.task
        assert stubs[role].left == 1
        for stub in stubs.values():
            known = (await router.get("/workers")).json()["workers"]
            assert [one["in_flight"] for one in known if one["url"] == stub.url] == [0]
