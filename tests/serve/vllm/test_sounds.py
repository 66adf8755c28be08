"""Sounds by URL: a language instance gets data, and never an address of a client."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.serve.vllm.stubs import Stub, picture, request, routed, text

pytestmark = pytest.mark.asyncio

ADDRESS = "http://169.254.169.254/latest"
DATA = "data:audio/wav;base64,AAAA"


def sound(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}, **more}


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize("beside", [(), (picture(),)], ids=["alone", "beside a picture"])
@pytest.mark.parametrize(
    ("part", "code"),
    [
        (sound(ADDRESS), "host_not_allowed"),
        (sound(f"  {ADDRESS}"), "host_not_allowed"),
        ({"audio_url": ADDRESS}, "host_not_allowed"),
        ({"audio_url": {"url": ADDRESS}, "uuid": "x"}, "host_not_allowed"),
        ({"type": "zzz", "audio_url": {"url": ADDRESS}}, "host_not_allowed"),
        (sound("file:///etc/passwd"), "file_not_allowed"),
        (sound("ftp://example.com/x"), "unsupported_url_scheme"),
        (sound(5), "invalid_request"),
        ({"type": "audio_url", "audio_url": {}}, "invalid_request"),
    ],
)
async def test_an_address_reaches_no_instance(part: dict[str, Any], code: str, beside: Any, role: str) -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    body = request(text(), *beside)
    body["messages"].append({"role": role, "content": [text(), part]})
    async with routed(encoder, language) as router:
        answer = await router.ask(body)
    assert 400 <= answer.status < 500
    assert (answer.error["code"], answer.error["param"]) == (code, "messages[1].content[1]")
    assert encoder.requests + language.requests == []


@pytest.mark.parametrize("beside", [(), (picture(),)], ids=["alone", "beside a picture"])
async def test_an_allowed_file_is_passed_on_as_data(tmp_path: Path, beside: Any) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF....WAVE")
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    url = (tmp_path / "a.wav").as_uri()
    parts = ({"audio_url": url, "uuid": "theirs"}, sound(DATA), text())
    async with routed(encoder, language, media={"allowed_folders": (tmp_path,)}) as router:
        assert (await router.ask(request(*beside, *parts))).status == 200
    sent = language.requests[0]["messages"][0]["content"][len(beside) :]
    encoded = base64.b64encode(b"RIFF....WAVE").decode()
    assert sent == [sound(f"data:audio/wav;base64,{encoded}"), sound(DATA), text()]


async def test_sounds_have_the_limits_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(bytes(2000))
    url, language = (tmp_path / "a.wav").as_uri(), Stub("l", "language")
    limits = {"allowed_folders": (tmp_path,), "max_bytes": 1000, "max_images": 2, "max_total_bytes": 1500}
    async with routed(Stub("e", "encode"), language, media=limits) as router:
        for parts, code in (
            ([sound(url)], "media_too_large"),
            ([sound(DATA + "A" * 2000)], "media_too_large"),
            ([sound(DATA + "A" * 1200)] * 2, "media_too_large"),
            ([sound(DATA)] * 3, "unsupported_value"),
        ):
            answer = await router.ask(request(*parts))
            assert 400 <= answer.status < 500
            assert answer.error["code"] == code
    assert language.requests == []


async def test_a_sound_within_the_request_passes_as_it_is() -> None:
    language = Stub("l", "language")
    part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    async with routed(Stub("e", "encode"), language) as router:
        assert (await router.ask(request(part, sound(DATA), text()))).status == 200
    assert language.requests[0]["messages"][0]["content"] == [part, sound(DATA), text()]
