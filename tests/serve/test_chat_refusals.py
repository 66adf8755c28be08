"""Bad input: each is refused with a 4xx and its code, without asking a worker, and the next request is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from embferry.serve.errors import CODES
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import DEADLINE, Deployment

pytestmark = pytest.mark.integration

MEDIA = {"max_images": 3, "max_videos": 1, "max_video_frames": 4, "max_bytes": 5_000, "max_total_bytes": 9_000}


def image(data: bytes | str) -> dict[str, Any]:
    url = data if isinstance(data, str) else pictures.data_url(data)
    return {"type": "image_url", "image_url": {"url": url}}


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": pictures.data_url(data, "video/mp4")}}


GOOD = pictures.png()
FIRST = "messages[0].content[0]"

# name: (changes of an otherwise good body, code, param)
BODIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "unknown model": ({"model": "gpt-4"}, "model_not_found", "model"),
    "no messages": ({"messages": []}, "invalid_request", "messages"),
    "messages missing": ({"messages": None}, "invalid_request", "messages"),
    "a message that is a text": ({"messages": ["hi"]}, "invalid_request", "messages[0]"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "unsupported_value", "messages[0].role"),
    "content missing": ({"messages": [{"role": "user"}]}, "invalid_request", "messages[0].content"),
    "content empty": ({"messages": [{"role": "user", "content": []}]}, "invalid_request", "messages[0].content"),
    "unknown part": ({"messages": user({"type": "input_audio"})}, "unsupported_value", f"{FIRST}.type"),
    "part without type or content": ({"messages": user({"x": "y"})}, "unsupported_value", f"{FIRST}.type"),
    "part that is a number": ({"messages": user(5)}, "unsupported_value", f"{FIRST}.type"),
    "text missing": ({"messages": user({"type": "text"})}, "invalid_request", f"{FIRST}.text"),
    "url missing": ({"messages": user({"type": "image_url"})}, "invalid_request", f"{FIRST}.image_url"),
    "url of another type": (
        {"messages": user({"type": "image_url", "image_url": 5})},
        "invalid_request",
        f"{FIRST}.image_url",
    ),
    "bad fps": ({"messages": user({"type": "video", "video": ["x"], "fps": 0})}, "invalid_request", f"{FIRST}.fps"),
    "picture of the assistant": (
        {"messages": [{"role": "assistant", "content": [image(GOOD)]}, *user("?")]},
        "unsupported_value",
        "messages[0].content",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "invalid_request",
        "messages[0].tool_calls[0]",
    ),
    "n": ({"n": 129}, "invalid_request", "n"),
    "tools": ({"tools": [{"type": "function"}]}, "unsupported_value", "tools"),
    "grammar": ({"response_format": {"type": "grammar"}}, "unsupported_value", "response_format"),
    "logprobs": ({"top_logprobs": 5}, "invalid_request", "top_logprobs"),
    "penalty": ({"presence_penalty": 2.5}, "invalid_request", "presence_penalty"),
    "bias": ({"logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
    "max_tokens 0": ({"max_tokens": 0}, "invalid_request", "max_tokens"),
    "max_tokens text": ({"max_tokens": "five"}, "invalid_request", "max_tokens"),
    "temperature": ({"temperature": 3}, "invalid_request", "temperature"),
    "top_p": ({"top_p": 0}, "invalid_request", "top_p"),
    "seed": ({"seed": 1.5}, "invalid_request", "seed"),
    "65 stops": ({"stop": ["x"] * 65}, "invalid_request", "stop"),
    "empty stop": ({"stop": ["a", ""]}, "invalid_request", "stop[1]"),
    "stream": ({"stream": "perhaps"}, "invalid_request", "stream"),
    "stream_options": ({"stream_options": {"include_usage": 7}}, "invalid_request", "stream_options.include_usage"),
}
# name: (parts of the user message, code)
PARTS: dict[str, tuple[list[Any], str]] = {
    "unknown scheme": ([image("ftp://host/a.png")], "unsupported_url_scheme"),
    "no scheme": ([image("picture.png")], "unsupported_url_scheme"),
    "not base64": ([image("data:image/png;base64,@@@")], "invalid_url"),
    "data without comma": ([image("data:image/png;base64")], "invalid_url"),
    "host outside the list": ([image("https://example.com/a.png")], "host_not_allowed"),
    "metadata service": ([image("http://169.254.169.254/latest")], "host_not_allowed"),
    "file outside the folders": ([image("file:///etc/passwd")], "file_not_allowed"),
    "too many bytes": ([image(b"\x89PNG\r\n\x1a\n" + bytes(6_000))], "media_too_large"),
    "too many bytes in all": ([image(pictures.encoded(pictures.noise(36, 36)))] * 3, "media_too_large"),
    "not a picture": ([image(b"just some text")], "unsupported_media_type"),
    "claims to be a picture": ([image(pictures.data_url(b"<html>", "image/png"))], "unsupported_media_type"),
    "svg": ([image(b"<svg/>")], "unsupported_media_type"),
    "no bytes": ([image("data:image/png;base64,")], "media_empty"),
    "0 × 0": ([image(pictures.claimed_png(0, 0))], "media_zero_size"),
    "bomb": ([image(pictures.claimed_png(30_000, 30_000))], "media_too_many_pixels"),
    "enormous": ([image(pictures.claimed_png(100_000, 1_000))], "media_side_too_long"),
    "a line": ([image(pictures.claimed_png(20_000, 10))], "media_aspect_ratio"),
    "header cut": ([image(GOOD[:20])], "image_truncated"),
    "video as picture": ([image(pictures.video(2))], "wrong_media_kind"),
    "picture as video": ([video(GOOD)], "wrong_media_kind"),
    "video cut": ([video(pictures.video(4)[:-400])], "video_truncated"),
    "too many pictures": ([image(GOOD)] * 4, "too_many_images"),
    "too many videos": ([video(pictures.video(2))] * 2, "too_many_videos"),
    "too many frames": ([{"type": "video", "video": [pictures.data_url(GOOD)] * 5}], "too_many_frames"),
    "no frames": ([{"type": "video", "video": []}], "media_empty"),
    "frames of two sizes": (
        [{"type": "video", "video": [pictures.data_url(pictures.png(w)) for w in (8, 16)]}],
        "video_frame_sizes",
    ),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    with Deployment(media=MEDIA, max_body_bytes=100_000) as running:
        yield running


def refused(shared: Deployment, body: Any, code: str, status: int | None = None) -> dict[str, Any]:
    """Sends ``body``, checks that it is refused without asking a worker, and returns the error."""
    before = [len(fake.requests) for fake in shared.fakes.values()]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = httpx.post(f"{shared.url}/v1/chat/completions", content=content, trust_env=False, timeout=DEADLINE)
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert answer.status_code == (status or CODES[code][0]) < 500
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert [len(fake.requests) for fake in shared.fakes.values()] == before
    return dict(error)


@pytest.mark.parametrize("name", BODIES)
def test_bad_fields_are_refused(shared: Deployment, name: str) -> None:
    changes, code, param = BODIES[name]
    body = {"model": "shapes", "messages": user("?"), **changes}
    error = refused(shared, {key: value for key, value in body.items() if value is not None}, code)
    assert error["param"] == param


@pytest.mark.parametrize("name", PARTS)
def test_bad_media_is_refused(shared: Deployment, name: str) -> None:
    parts, code = PARTS[name]
    error = refused(shared, {"model": "shapes", "messages": user("look:", *parts)}, code)
    assert error["param"].startswith("messages")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 50_000, b'{"model": "shapes", "messages": "\\ud800"}'],
    ids=["empty", "cut", "list", "text", "not utf-8", "nested", "half a surrogate pair"],
)
def test_a_body_that_is_no_json_object_is_refused(shared: Deployment, body: bytes) -> None:
    refused(shared, body, "invalid_json")


def test_a_body_that_is_too_long_is_refused(shared: Deployment) -> None:
    refused(shared, b" " * 100_001, "body_too_large")


def test_the_first_of_several_bad_parts_is_reported(shared: Deployment) -> None:
    parts = [image(GOOD), image(b"junk"), image("ftp://x/")]
    error = refused(shared, {"model": "shapes", "messages": user(*parts)}, "unsupported_media_type")
    assert error["param"] == "messages[0].content[1]"


def test_the_client_library_raises_by_status_and_the_next_request_is_answered(shared: Deployment) -> None:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=user("?"))
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="shapes", messages=user(image(pictures.claimed_png(0, 0)), "?"))
        assert caught.value.code == "media_zero_size"
        assert caught.value.param == "messages[0].content[0]"
        answer = client.chat.completions.create(model="shapes", messages=user(image(GOOD), "?"))
        assert answer.choices[0].message.content == "a red circle"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "n" * 20_000_000}, "model_not_found"),
        ({"model": "a\n\x1b[31mb"}, "model_not_found"),
        ({"messages": [{"role": "r\n" * 10_000_000, "content": "?"}]}, "unsupported_value"),
        ({"messages": [{"role": "user", "content": [{"type": "t\n" * 10_000_000}]}]}, "unsupported_value"),
        ({"messages": [{"role": "user", "content": "word " * 1_000_000}]}, "context_length_exceeded"),
        ({"stop": ["s" * 20_000_000]}, "invalid_request"),
        ({"n": ["x" * 20_000_000]}, "invalid_request"),
        ({"temperature": {"a\n" * 10_000_000: 1}}, "invalid_request"),
        ({"messages": [[]] * 300_000}, "invalid_json"),
    ],
    ids=range(9),
)
def test_what_a_client_sends_is_not_repeated_in_full(
    http: httpx.Client,
    deployment: Deployment,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, object],
    code: str,
) -> None:
    body = {"model": "shapes", "messages": user("?")} | change
    response = http.post("/v1/chat/completions", json=body)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 3000
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"].isprintable()
    assert error["param"] is None or error["param"].isprintable()
    assert all(fake.requests == [] for fake in deployment.fakes.values())
    assert all(len(record.getMessage()) < 3000 for record in caplog.records if record.name.startswith("embferry"))


@pytest.mark.parametrize("path", ["/v1/models/", "/"])
def test_a_path_with_line_breaks_is_escaped(http: httpx.Client, path: str) -> None:
    response = http.get(path + "a%0a12:00 info forged%1b[2J%e2%80%a8" + "x" * 30_000)
    assert response.status_code == 404
    assert response.json()["error"]["message"].isprintable()
    assert len(response.content) < 3000
