"""The media parts of a request, and their replacement."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from embferry.serve.errors import ServeError
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.media_parts import media_parts, parse_request, with_parts, without_uuids
from tests.serve.vllm.sound_parts import sound
from tests.serve.vllm.stubs import picture, request, text, video

URL = "https://host/a.png"


def test_media_parts_know_their_place() -> None:
    asked = request(text(), picture(), text(), video(), sound())
    asked["messages"].insert(0, {"role": "system", "content": "be brief"})
    asked["messages"].append({"role": "assistant", "content": None})
    found = media_parts(asked)
    assert [(p.message, p.part, p.kind) for p in found] == [(1, 1, "image"), (1, 3, "video"), (1, 4, "audio")]
    assert found[0].param == "messages[1].content[1]"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": URL},
        {"image_url": URL},
        {"image_url": {"url": URL, "detail": "low"}, "uuid": "a client's"},
        {"type": "input_image", "image_url": URL},
        {"type": "image", "image": URL},
        {"type": "image", "image": {"url": URL}, "video_url": None},
        {"image": URL},
    ],
)
def test_every_way_to_write_a_picture(part: dict[str, Any]) -> None:
    (found,) = media_parts(request(part))
    assert (found.kind, found.url) == ("image", URL)


@pytest.mark.parametrize(
    ("part", "url"),
    [
        ({"type": "audio_url", "audio_url": {"url": URL}}, URL),
        ({"type": "audio_url", "audio_url": URL}, URL),
        ({"audio_url": URL, "uuid": "a client's"}, URL),
        ({"type": "zzz", "audio_url": URL}, URL),  # no instance may get the address
        ({"type": 5, "audio_url": {"url": URL}, "image_url": "x"}, URL),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "data:audio/wav;base64,AAAA"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}, "data:audio/wav;base64,AAAA"),
        ({"input_audio": {"data": "AAAA"}}, "data:audio/wav;base64,AAAA"),
        ({"input_audio": {"data": "AAAA", "format": ",x;base64,"}}, "data:audio/wav;base64,AAAA"),
    ],
)
def test_every_way_to_write_a_sound(part: dict[str, Any], url: str) -> None:
    (found,) = media_parts(request(part))
    assert (found.kind, found.url) == ("audio", url)


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "input_audio"}, "invalid_request"),
        ({"type": "input_audio", "input_audio": None}, "invalid_request"),
        *(
            ({"type": "input_audio", "input_audio": source, **more}, "invalid_request")
            for source in ("AAAA", URL, 5, ["AAAA"], {"data": ""}, {"data": 5}, {"data": ["AAAA"]}, {"data": 0})
            for more in ({}, {"uuid": "x"})
        ),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "invalid_request"),
        ({"type": "audio_url", "audio_url": {}}, "invalid_request"),
        ({"type": "audio_url", "audio_url": [URL]}, "invalid_request"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}, "audio_url": URL}, "invalid_request"),
        ({"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": "x"}, "unsupported_value"),
        ({"type": "image_embeds", "uuid": "x"}, "unsupported_value"),
        ({"image_embeds": None, "uuid": "x"}, "unsupported_value"),
        ({"type": "video_embeds", "video_embeds": {}}, "unsupported_value"),
        ({"type": "audio_embeds", "audio_embeds": "AAAA"}, "unsupported_value"),
        ({"image_pil": None, "uuid": "x"}, "unsupported_value"),
        ({"type": "image_url", "image_url": URL, "image_embeds": {}}, "unsupported_value"),
        ({"type": "image_url"}, "invalid_request"),
        ({"type": "image_url", "image_url": None, "uuid": None}, "invalid_request"),
        ({"type": "image_url", "image_url": None, "uuid": ""}, "invalid_request"),
        ({"type": "image_url", "image_url": "", "uuid": "x"}, "invalid_request"),
        ({"type": "image_url", "image_url": {"url": ""}}, "invalid_request"),
        ({"image_url": URL, "video_url": URL}, "invalid_request"),
        ({"type": "video_url", "video_url": [URL]}, "invalid_request"),
        ({"type": "video", "video": [URL, URL]}, "invalid_request"),
        ({"type": "text", "text": "x", "image_url": URL, "uuid": "x"}, "invalid_request"),
        ({"type": "video_url", "video_url": URL, "audio_url": URL}, "invalid_request"),
        ({"type": "audio_url", "audio_url": URL, "image": URL}, "invalid_request"),
        ({"type": "input_audio", "input_audio": {}, "audio_url": URL}, "invalid_request"),
        ({"video": URL, "input_audio": {}}, "invalid_request"),
        ({"type": "prompt_embeds", "data": "AAAA"}, "unsupported_value"),
    ],
)
def test_parts_with_embeddings_or_without_a_url_are_refused(part: dict[str, Any], code: str) -> None:
    with pytest.raises(ServeError) as raised:
        media_parts(request(text(), part))
    assert (raised.value.code, raised.value.http_status) == (code, 400)
    assert raised.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"ec_transfer_params": {}}, "ec_transfer_params"),
        ({"ec_transfer_params": {"x": {"embferry": {"endpoint": "tcp://10.0.0.9:1"}}}}, "ec_transfer_params"),
        ({"vllm_xargs": {"ec_transfer_params": "x"}}, "vllm_xargs.ec_transfer_params"),
        ({"kv_transfer_params": {"remote_host": "10.0.0.9"}}, "kv_transfer_params"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params"),
    ],
)
def test_transfer_parameters_from_a_client_are_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ServeError) as raised:
        parse_request(json.dumps(request(text(), **more)).encode())
    assert (raised.value.http_status, raised.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ServeError) as raised:
        parse_request(body)
    assert raised.value.code == "invalid_json"


@pytest.mark.parametrize("messages", [None, "hello", [None], [{"content": 5}], [{"content": [None, "x"]}]])
def test_malformed_messages_are_left_to_vllm(messages: Any) -> None:
    assert media_parts({"messages": messages}) == []


def test_audio_of_a_video_is_refused() -> None:
    asked = request(video(), mm_processor_kwargs={"use_audio_in_video": True})
    with pytest.raises(ServeError) as raised:
        media_parts(asked)
    assert raised.value.param == "mm_processor_kwargs"
    assert len(media_parts(request(picture(), mm_processor_kwargs={"use_audio_in_video": True}))) == 1


def test_everything_but_the_media_part_stays() -> None:
    asked = request(text(), {**picture(), "uuid": "mine", "caption": "for the template"}, tools=[{"x": 1}], seed=5)
    asked["messages"].append({"role": "user", "content": [text("and?")], "name": "me"})
    before = json.dumps(asked)
    (part,) = media_parts(asked)
    changed = with_parts(asked, [(part, {"type": "image_embeds", "uuid": "ours"})])
    assert json.dumps(asked) == before
    expected = json.loads(before)
    expected["messages"][0]["content"][1] = {"caption": "for the template", "type": "image_embeds", "uuid": "ours"}
    assert changed == expected


@pytest.mark.parametrize("part", [{"type": "zzz", "image_url": URL}, {"type": 5, "image_url": URL}, {"zzz": URL}, {}])
def test_parts_of_other_types_are_left_to_vllm(part: dict[str, Any]) -> None:
    assert media_parts(request(part)) == []
    assert without_uuids(request(part)) == request(part)


def test_a_text_without_a_type_gets_one() -> None:
    assert without_uuids(request({"text": "x", "uuid": "y"}, {"text": None})) == request(text("x"), {"text": None})


def test_uuids_of_clients_are_removed() -> None:
    asked = request({**text(), "uuid": "x"}, {"type": "input_audio", "input_audio": None, "uuid": "theirs"})
    assert without_uuids(asked) == request(text(), {"type": "input_audio", "input_audio": None})
    assert without_uuids(request(text())) == request(text())
    assert without_uuids({"messages": 5}) == {"messages": 5}
    asked = request({**text(), "uuid": "x"}, picture())
    (part,) = media_parts(asked)
    assert with_parts(asked, [(part, {})]) == request(text(), {})


def test_a_model_name_without_bound_reaches_no_instance() -> None:
    with pytest.raises(ServeError) as caught:
        parse_request(json.dumps({"model": "n\n" * 10_000_000, "messages": []}).encode())
    assert caught.value.code == "model_not_found"
    assert len(caught.value.detail) < 300


def test_a_long_error_of_an_instance_is_cut() -> None:
    error = VerbatimError.of(httpx.Response(400), b'{"error": {"message": "' + b"n" * 20_000_000 + b'"}}')
    assert len(error.body) < 3000
    assert json.loads(error.body)["error"]["code"] == "invalid_request"
    assert VerbatimError.of(httpx.Response(400), b"short").body == b"short"
