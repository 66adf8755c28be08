"""Chat completions that succeed, through a real router with the real openai client."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import END, TRANSFER, Deployment, tokens

pytestmark = pytest.mark.integration

PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}
VIDEO = {"type": "video_url", "video_url": {"url": pictures.data_url(pictures.video(4), "video/mp4")}}


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="shapes", messages=messages, **options)


def test_a_picture_is_encoded_then_answered_about(deployment: Deployment, client: openai.OpenAI) -> None:
    answer = ask(client, user(PICTURE, "what is it?"), max_tokens=5)
    assert answer.choices[0].message.content == "a red circle"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "shapes"
    assert answer.usage.total_tokens == 73
    (encoding,), (generation,) = (deployment.fakes[name].requests for name in ("encode0", "language0"))
    assert encoding["items"] == [{"kind": "image", "data": pictures.png(), "param": "messages[0].content[0]"}]
    assert generation["room"] == encoding["room"]
    assert 0 <= encoding["room"] < 1 << 63
    assert generation["endpoint"] == "tcp://127.0.0.1:1"
    assert generation["items"][0]["grid_thw"] == [1, 8, 8]
    parts = [{"type": "image", "item": 0}, {"type": "text", "text": "what is it?"}]
    assert generation["messages"] == [{"role": "user", "parts": parts}]
    assert generation["sampling"] == {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": []}
    assert answer.embferry["transfer"] == TRANSFER
    assert answer.embferry["tokens"] == [100, 101, 102]
    assert answer.embferry["room"] == str(encoding["room"])  # a number above 2⁵³ is rounded by JavaScript


def test_text_alone_needs_no_encode_worker(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.workers = [deployment.entry("language0")]
    deployment.fakes["language0"].script = [*tokens("hi"), {**END, "transfer": None}]
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "hello!"},
    ]
    answer = ask(client, conversation)
    assert answer.choices[0].message.content == "hi"
    assert answer.embferry["room"] is None
    assert answer.embferry["transfer"] is None
    generation = deployment.fakes["language0"].requests[0]
    assert (generation["room"], generation["endpoint"], generation["items"]) == (None, None, [])
    assert [m["role"] for m in generation["messages"]] == ["system", "system", "user", "assistant", "user"]
    assert deployment.fakes["encode0"].requests == []


def test_a_stream_has_role_text_end_and_usage(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script.insert(1, {"type": "ping"})
    chunks = list(ask(client, user(PICTURE, "?"), stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas[1:-1]] == ["a ", "red ", "circle"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert chunks[-2].embferry["transfer"] == TRANSFER
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 70


def test_the_bytes_of_a_stream(deployment: Deployment, http: httpx.Client) -> None:
    deployment.fakes["language0"].script = [*tokens("", "né"), END]
    body = {"model": "shapes", "messages": user("?"), "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert len(lines[:-2]) == 3  # role, "né", end: an empty text has no event
    assert "usage" not in lines[-3]


def test_the_first_token_is_not_held_back(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script = [*tokens("now"), "hold", END]
    stream = ask(client, user("?"), stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "now"]
    deployment.release.set()
    assert [chunk.choices[0].finish_reason for chunk in stream] == ["stop"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({}, {"max_tokens": None, "temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.5, "seed": 3}, {"temperature": 0.7, "top_p": 0.5, "seed": 3}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"n": 1, "logprobs": False, "response_format": {"type": "text"}, "frequency_penalty": 0}, {}),
        ({"extra_body": {"an_unknown_field": 1}, "user": "me", "store": False}, {}),
    ],
)
def test_sampling_options_reach_the_language_worker(
    deployment: Deployment, client: openai.OpenAI, options: Any, expected: Any
) -> None:
    ask(client, user("?"), **options)
    sampling = deployment.fakes["language0"].requests[0]["sampling"]
    assert {key: sampling[key] for key in expected} == expected


def test_several_items_keep_their_order(deployment: Deployment, client: openai.OpenAI) -> None:
    blue = {"type": "image", "image": pictures.data_url(pictures.png(colour="blue"))}
    ask(client, [*user("first", PICTURE, VIDEO), {"role": "assistant", "content": "ok"}, *user(blue, "and?")])
    encoding, generation = (deployment.fakes[name].requests[0] for name in ("encode0", "language0"))
    assert [item["kind"] for item in encoding["items"]] == ["image", "video", "image"]
    assert encoding["items"][1] == {"kind": "video", "data": pictures.video(4), "param": "messages[0].content[2]"}
    assert encoding["items"][2]["param"] == "messages[2].content[0]"
    assert encoding["items"][2]["data"] == pictures.png(colour="blue")
    assert [p.get("item") for m in generation["messages"] for p in m["parts"]] == [None, 0, 1, None, 2, None]


FRAMES = [pictures.png(colour=colour) for colour in ("red", "blue")]
URLS = [pictures.data_url(frame) for frame in FRAMES]
JPEG_LIST = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in FRAMES)


@pytest.mark.parametrize(
    ("part", "fps"),
    [
        ({"type": "video", "video": URLS, "fps": 4}, 4.0),
        ({"type": "video", "video": URLS}, 2.0),
        ({"type": "video_url", "video_url": {"url": URLS, "fps": 1}}, 1.0),
        ({"type": "video_url", "video_url": {"url": JPEG_LIST}}, 2.0),
        ({"type": "video", "video": [{"url": url} for url in URLS], "fps": 3}, 3.0),
    ],
)
def test_every_way_to_send_a_video_as_frames(
    deployment: Deployment, client: openai.OpenAI, part: Any, fps: float
) -> None:
    ask(client, user(part, "?"))
    (item,) = deployment.fakes["encode0"].requests[0]["items"]
    assert item == {"kind": "video", "frames": FRAMES, "fps": fps, "param": "messages[0].content[0]"}


def test_the_frame_rate_for_a_video_file_is_passed_on(deployment: Deployment, client: openai.OpenAI) -> None:
    ask(client, user({**VIDEO, "fps": 5}, "?"))
    assert deployment.fakes["encode0"].requests[0]["items"][0]["fps"] == 5


def test_a_file_from_an_allowed_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(pictures.png())
    with Deployment(media={"allowed_folders": (tmp_path,)}) as deployment:
        client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="x", max_retries=0)
        url = (tmp_path / "a b.png").as_uri()
        with client:
            ask(client, user({"type": "image_url", "image_url": {"url": url}}, "?"))
        assert deployment.fakes["encode0"].requests[0]["items"][0]["data"] == pictures.png()


def test_equally_loaded_workers_take_turns(deployment: Deployment, client: openai.OpenAI, http: httpx.Client) -> None:
    deployment.workers = [deployment.entry(name) for name in deployment.fakes]
    deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
    for _ in range(4):
        ask(client, user(PICTURE, "?"))
    assert [len(deployment.fakes[name].requests) for name in ("encode0", "encode1")] == [2, 2]


def test_the_least_loaded_worker_is_asked_first(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    deployment.workers = [
        deployment.entry("encode0", load=9),
        deployment.entry("encode1"),
        deployment.entry("language0"),
    ]
    deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
    for _ in range(3):
        ask(client, user(PICTURE, "?"))
    assert [len(deployment.fakes[name].requests) for name in ("encode0", "encode1")] == [0, 3]
