"""Requests that are answered: what each instance gets, and what the client gets."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.vllm.stubs import (
    DONE,
    HOLD,
    ROLE,
    SHAPE,
    Stub,
    answered,
    completion,
    data_url,
    encoded,
    events_of,
    held,
    picture,
    request,
    routed,
    streamed,
    text,
    until,
    video,
)

pytestmark = pytest.mark.asyncio


def pair() -> tuple[Stub, Stub]:
    return Stub("enc", "encode"), Stub("lang", "language")


async def test_a_picture_is_encoded_and_the_question_names_its_embedding() -> None:
    encoder, language = pair()
    more = {"tools": [{"type": "function"}], "logprobs": True, "return_token_ids": True, "seed": 3, "max_tokens": 9}
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), text(), **more, mm_processor_kwargs={"max_pixels": 9}))
    assert (answer.status, answer.json()) == (200, completion("a red circle"))
    (encode,), (asked,) = encoder.requests, language.requests
    uuid = encode["messages"][0]["content"][0]["uuid"]
    assert encode == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [picture(uuid=uuid)]}],
        "mm_processor_kwargs": {"max_pixels": 9},
        "max_tokens": 1,
        "stream": False,
    }
    (entry,) = asked["ec_transfer_params"].values()
    assert len(entry["embferry"].pop("failover_token")) >= 32
    assert asked == {
        **request(text(), **more, mm_processor_kwargs={"max_pixels": 9}),
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 12, 16]}, "uuid": uuid},
                    text(),
                ],
            }
        ],
        "ec_transfer_params": {
            uuid: {
                "item_indices": [0],
                "metadata": {"image_grid_thw": [[1, 12, 16]]},
                "embferry": {"endpoint": "tcp://enc:1", "room": 7, **SHAPE},
            }
        },
    }


async def test_items_are_encoded_at_the_same_time_and_each_content_once() -> None:
    encoder, language = pair()
    encoder.behaviours = [held] * 3
    async with routed(encoder, language) as router:
        call = router.call(request(picture(b"1"), picture(b"2"), video(), picture(b"1"), text()))
        await until(lambda: len(encoder.requests) == 3)
        encoder.release.set()
        assert (await call.answer()).status == 200
    assert len(encoder.requests) == 3
    parts = language.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_embeds", "image_embeds", "video_url", "image_embeds", "text"]
    assert parts[0] == parts[3] != parts[1]
    assert set(language.requests[0]["ec_transfer_params"]) == {part["uuid"] for part in parts[:3]}


async def test_text_alone_passes_unchanged_to_a_language_instance() -> None:
    encoder, language = pair()
    body = b'{"model":"tiny",  "messages":[{"role":"user","content":"hi"}], "odd":1.50}'
    async with routed(encoder, language) as router:
        assert (await router.ask(body)).status == 200
    assert (encoder.requests, language.requests) == ([], [json.loads(body)])
    assert language.headers[0]["content-length"] == str(len(body))


async def test_a_stream_passes_unchanged() -> None:
    encoder, language = pair()
    events = [b": keep-alive\n\n", *events_of("one two three")]
    torn = b"".join(events)
    language.behaviours = [streamed(*(torn[at : at + 7] for at in range(0, len(torn), 7)))]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), stream=True))
    assert (answer.status, answer.body) == (200, torn)
    assert answer.headers["content-type"] == "text/event-stream"


async def test_the_response_begins_with_the_first_token() -> None:
    encoder, language = pair()
    role, first, *rest = events_of("one two")
    language.behaviours = [streamed(role, HOLD, first, HOLD, *rest)]
    async with routed(encoder, language) as router:
        call = router.call(request(picture(), stream=True))
        await until(lambda: language.holding)
        assert call.sent == []
        language.release.set()
        await call.until(lambda: len(call.sent) >= 2)
        assert call.body.startswith(role + first)
        assert (await call.answer()).body == b"".join([role, first, *rest])


@pytest.mark.parametrize("more", [{"echo": True}, {"echo": True, "n": 2}])
async def test_an_echo_does_not_count_as_a_token(more: dict[str, Any]) -> None:
    encoder, language = pair()
    echo = events_of("what is there?")[1] * more.get("n", 1)
    first, *rest = events_of("one")[1:]
    language.behaviours = [streamed(ROLE + echo, HOLD, first, *rest)]
    async with routed(encoder, language) as router:
        call = router.call(request(picture(), stream=True, **more))
        await until(lambda: language.holding)
        assert call.sent == []
        language.release.set()
        assert (await call.answer()).status == 200


async def test_without_metadata_the_language_instance_gets_the_picture_and_the_embedding() -> None:
    encoder, language = pair()
    encoder.behaviours = [encoded(metadata={})]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture()))).status == 200
    (part,) = language.requests[0]["messages"][0]["content"]
    assert part == picture(uuid=part["uuid"])
    assert part["uuid"] in language.requests[0]["ec_transfer_params"]


async def test_without_frame_times_the_language_instance_gets_the_video_and_the_embedding() -> None:
    encoder, language = pair()
    async with routed(encoder, language) as router:
        assert (await router.ask(request(video()))).status == 200
    (part,) = language.requests[0]["messages"][0]["content"]
    assert part == {**video(), "uuid": part["uuid"]}
    assert part["uuid"] in language.requests[0]["ec_transfer_params"]


async def test_frame_times_of_a_video_pass_with_its_grid() -> None:
    encoder, language = pair()
    encoder.behaviours = [encoded(metadata={"video_grid_thw": [[2, 4, 4]], "timestamps": [[0.5, 1.5]]})]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(video()))).status == 200
    (part,) = language.requests[0]["messages"][0]["content"]
    assert part["video_embeds"] == {"video_grid_thw": [2, 4, 4], "timestamps": [0.5, 1.5]}


async def test_request_id_and_key_reach_the_instances() -> None:
    encoder, language = pair()
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture()), x_request_id="abc", authorization="Bearer theirs")
    assert answer.headers["x-request-id"] == language.headers[0]["x-request-id"] == "abc"
    assert encoder.headers[0]["x-request-id"].startswith("abc-")
    assert {stub.headers[0]["authorization"] for stub in (encoder, language)} == {"Bearer theirs"}


async def test_the_router_can_require_a_key() -> None:
    encoder, language = pair()
    async with routed(encoder, language, router={"api_key": "k"}) as router:
        assert (await router.ask(request(picture()))).status == 401
        assert (await router.ask(request(picture()), authorization="Bearer k")).status == 200
        assert (await router.get("/health")).status == 200
    assert language.headers[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize("connector", ["example", "mooncake"])
async def test_other_connectors_get_their_own_parameters(connector: str) -> None:
    encoder, language = pair()
    encoder.behaviours = [encoded(embferry=None)]
    more = {"consumer_zmq": ("tcp://10.0.0.3:14750",)} if connector == "mooncake" else {}
    async with routed(encoder, language, connector=connector, **more) as router:
        assert (await router.ask(request(picture()))).status == 200
    (uuid,) = (part["uuid"] for part in language.requests[0]["messages"][0]["content"])
    params = language.requests[0]["ec_transfer_params"]
    assert params.pop(uuid) == {"item_indices": [0], "metadata": {"image_grid_thw": [[1, 12, 16]]}}
    if connector == "example":
        assert "ec_transfer_params" not in encoder.requests[0]
        assert params == {}
        return
    asked = encoder.requests[0]["ec_transfer_params"]
    assert asked["consumer_zmq"] == "tcp://10.0.0.3:14750"
    (transfer,) = asked["ec_items"]
    assert params == {"ec_items": [{"mm_hash": uuid, **transfer}]}


async def test_each_model_goes_to_its_instances() -> None:
    one, other = Stub("one", "encode", ("a",)), Stub("other", "encode", ("b",))
    first, second = Stub("first", "language", ("a",)), Stub("second", "language", ("b", "c"))
    async with routed(one, other, first, second) as router:
        for model, encoder, language in (("a", one, first), ("b", other, second)):
            assert (await router.ask({**request(picture()), "model": model})).status == 200
            assert encoder.requests.pop()["model"] == language.requests.pop()["model"] == model
        assert one.requests + other.requests + first.requests + second.requests == []
        assert [model["id"] for model in (await router.get("/v1/models")).json()["data"]] == ["a", "b", "c"]
        assert (await router.get("/v1/models/c")).json()["id"] == "c"  # texts need no encoder
        assert (await router.ask({**request(text()), "model": "c"})).status == 200
        assert (await router.ask({**request(picture()), "model": "c"})).status == 404
        assert (await router.get("/v1/models/d")).status == 404


async def test_metrics_count_requests_and_encodes() -> None:
    encoder, language = pair()
    async with routed(encoder, language, received_bytes=0) as router:
        for _ in range(3):
            await router.ask(request(picture(), stream=True))
        await router.ask(request(text()))
        assert await router.counted("encodes_total") == 3
        assert await router.counted("affinity_hits_total") == 2
        assert await router.counted("media_items_total", '{kind="image"}') == 3
        assert await router.counted("http_requests_total", '{path="/v1/chat/completions",status="200"}') == 4
        assert await router.counted("chat_first_token_seconds_count") == 3
        assert await router.counted("workers", '{role="encode"}') == 1


async def test_data_urls_reach_the_encoder_unchanged() -> None:
    encoder, language = pair()
    url = data_url(b"frames", "video/jpeg") + "," + data_url(b"more").partition(",")[2]
    async with routed(encoder, language) as router:
        await router.ask(request({"type": "video_url", "video_url": {"url": url}}))
    assert encoder.requests[0]["messages"][0]["content"][0]["video_url"] == {"url": url}


async def test_a_tool_call_may_have_no_text() -> None:
    encoder, language = pair()
    end = events_of("", "tool_calls")[1]
    language.behaviours = [streamed(ROLE, end, DONE), answered("x", "tool_calls")]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture(), stream=True))).body == ROLE + end + DONE
        assert (await router.ask(request(picture()))).status == 200


@pytest.mark.parametrize("number", ["2", "x", 2.0, [2], None])
async def test_a_number_of_answers_of_another_type_is_for_vllm_to_judge(number: Any) -> None:
    async with routed(Stub("e", "encode"), language := Stub("l", "language")) as router:
        answer = await router.ask(request(text(), n=number, echo=True, stream=True))
    assert answer.status == 200
    assert language.requests[0]["n"] == number


@pytest.mark.parametrize("messages", [None, 5, "hi", {}])
async def test_messages_that_are_no_list_are_refused(messages: Any) -> None:
    async with routed(Stub("e", "encode"), language := Stub("l", "language")) as router:
        answer = await router.ask({"model": "tiny", "messages": messages})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert not language.requests


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Failed to load image: cannot identify image file <_io.BytesIO object at 0x7f>", "send it as PNG or JPEG"),
        ("Failed to apply Qwen3VLProcessor on data={'text': '<|vision_start|>", "one side much longer"),
    ],
)
async def test_a_picture_that_vllm_cannot_read_is_named_in_plain_words(said: str, why: str) -> None:
    async def refuse(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(400, json={"error": {"message": said}})

    async with routed(Stub("e", "encode", behaviours=[refuse] * 2), Stub("l", "language")) as router:
        answer = await router.ask(request(text(), picture()))
        assert (answer.status, answer.error["code"]) == (400, "image_corrupt")
        assert answer.error["param"] == "messages[0].content[1]"
        assert why in answer.error["message"]
        assert "BytesIO" not in answer.error["message"]
        options = await router.ask(request(picture(), mm_processor_kwargs={"max_pixels": "x"}))
        assert options.error["message"] == said  # the options may be the reason
