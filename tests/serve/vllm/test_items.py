"""Names of pictures and videos, and limits on them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.vllm.items import Item, load_items
from embferry.serve.vllm.media_parts import media_parts
from tests.serve.vllm.sound_parts import sound, wav
from tests.serve.vllm.stubs import data_url, mp4, picture, request, text, video


def loaded(asked: dict[str, Any], **limits: Any) -> list[Item]:
    media = MediaSettings(**limits)

    async def run() -> list[Item]:
        fetcher = Fetcher(media)
        try:
            return await load_items(media_parts(asked), asked, fetcher, media, lambda nbytes: None)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def name(*content: Any, **more: Any) -> str:
    (item,) = loaded(request(*content, **more))
    return item.uuid


def test_the_name_is_a_digest_of_the_content() -> None:
    first = name(picture(b"a"))
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert name(picture(b"a")) == first
    assert name(text("another question"), picture(b"a", uuid="a client's"), temperature=1) == first
    assert name({"image_url": data_url(b"a", "image/jpeg")}) == first  # a picture's media type does not matter


@pytest.mark.parametrize(
    "other",
    [
        request(picture(b"b")),
        request(video(b"a")),
        request(sound(b"a")),
        request(picture(b"a"), mm_processor_kwargs={"max_pixels": 50176}),
        request(picture(b"a"), media_io_kwargs={"image": {"rgba_background_color": [0, 0, 0]}}),
        {**request(picture(b"a")), "model": "another"},
    ],
)
def test_options_that_change_the_embedding_change_the_name(other: dict[str, Any]) -> None:
    assert loaded(other)[0].uuid != name(picture(b"a"))


def test_a_list_of_frames_differs_from_a_video_of_the_same_bytes() -> None:
    frames = {"type": "video_url", "video_url": {"url": data_url(mp4(b"a"), "video/jpeg")}}
    assert name(frames) != name(video(b"a"))


DATA = data_url(wav(), "audio/wav")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": DATA.partition(",")[2], "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": DATA.partition(",")[2], "format": "flac"}},
        {"audio_url": data_url(wav(), "audio/mpeg")},
        {"input_audio": {"data": DATA.partition(",")[2].rstrip("=") + "\n"}},
    ],
)
def test_a_sound_has_one_name_in_whatever_form_it_comes(part: dict[str, Any]) -> None:
    assert name(part) == name(sound(b"a sound"))


WRITTEN = {
    "white space before it": lambda url: f" \n{url}",
    "white space in it": lambda url: f"{url[:30]}\r\n {url[30:]}",
    "the other alphabet": lambda url: url[:22] + url[22:].replace("+", "-").replace("/", "_"),
    "no padding": lambda url: url.rstrip("="),
    "escapes": lambda url: url[:22] + url[22:].replace("+", "%2B").replace("=", "%3D"),
    "a space before base64": lambda url: url.replace(";base64", "; base64 "),
    "escapes of white space": lambda url: url[:30] + "%09%0a%0A%0c%0D%20" + url[30:],
    "no base64": lambda _: "data:image/png," + "".join(f"%{byte:02x}" for byte in CONTENT),
}
CONTENT = b"\xfb\xef\xbe\xff" * 10


@pytest.mark.parametrize("how", WRITTEN)
def test_however_a_data_url_is_written_vllm_gets_plain_base64(how: str) -> None:
    written = WRITTEN[how](data_url(CONTENT))
    (item,) = loaded(request({"type": "image_url", "image_url": {"url": written}}))
    assert item == Item("image", name(picture(CONTENT)), data_url(CONTENT))


def test_the_frames_of_a_list_are_written_plainly_too() -> None:
    one, two = (data_url(frame, "video/jpeg") for frame in (CONTENT, b"other"))
    whole = f"{one},{two.partition(',')[2]}"
    odd = f" {one.replace('+', '-').replace('/', '_').replace('video_jpeg', 'video/jpeg')},{two.partition(',')[2]}"
    assert loaded(request({"video_url": {"url": odd.rstrip("=")}})) == loaded(request({"video_url": {"url": whole}}))


def test_padding_beyond_need_and_the_other_name_of_a_list_are_read_as_on_our_own_engine() -> None:
    padded = {"type": "image_url", "image_url": {"url": data_url(b"abc") + "===="}}
    assert loaded(request(padded)) == loaded(request(picture(b"abc")))
    urls = [data_url(b"abc", f"video/{name}") + ",AAAA" for name in ("jpg", "jpeg")]
    jpg, jpeg = (loaded(request({"type": "video_url", "video_url": {"url": url}})) for url in urls)
    assert jpg == jpeg


def test_a_file_has_the_name_of_the_same_bytes_inline(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    url = (tmp_path / "a.png").as_uri()
    (item,) = loaded(request({"type": "image_url", "image_url": {"url": url}}), allowed_folders=(tmp_path,))
    assert item == Item("image", name(picture(b"a picture")), data_url(b"a picture"))
    assert item.part() == {"type": "image_url", "image_url": {"url": data_url(b"a picture")}, "uuid": item.uuid}


@pytest.mark.parametrize(
    ("content", "limits", "code", "param"),
    [
        ([picture(b"a"), picture(b"b")], {"max_images": 1}, "too_many_images", "messages"),
        ([picture(b"a"), sound(b"a"), sound(b"b")], {"max_images": 1}, "too_many_sounds", "messages"),
        ([text(), sound(b"a sound")], {"max_bytes": 3}, "media_too_large", "messages[0].content[1]"),
        ([picture(b"x" * 99), sound(b"y" * 99)], {"max_total_bytes": 150}, "media_too_large", "messages"),
        ([{"audio_url": "data:audio/wav;base64,"}], {}, "media_empty", "messages[0].content[0]"),
        ([{"audio_url": data_url(b"\x89PNG\r\n\x1a\n")}], {}, "wrong_media_kind", "messages[0].content[0]"),
        ([{"input_audio": {"data": "@@@@"}}], {}, "invalid_url", "messages[0].content[0]"),
        ([{"input_audio": {"data": "AAAA,AAAA"}}], {}, "invalid_url", "messages[0].content[0]"),
        ([{"input_audio": {"data": DATA}}], {}, "invalid_url", "messages[0].content[0]"),
        ([video()], {"max_videos": 1, "max_bytes": 3}, "media_too_large", "messages[0].content[0]"),
        ([picture(b"x" * 99), picture(b"y" * 99)], {"max_total_bytes": 150}, "media_too_large", "messages"),
        ([text(), {"image_url": "data:image/png,%PDF-1.7"}], {}, "unsupported_media_type", "messages[0].content[1]"),
        ([picture(b"%PDF-1.7")], {}, "unsupported_media_type", "messages[0].content[0]"),
        ([picture(b"<!DOCTYPE html><html>" * 900)], {}, "unsupported_media_type", "messages[0].content[0]"),
        ([{"image_url": "data:image/png;base64,@@@@"}], {}, "invalid_url", "messages[0].content[0]"),
        ([{"image_url": "http://ex\ud800ample.com/"}], {}, "invalid_url", "messages[0].content[0]"),
        ([{"image_url": "data:image/png;base64"}], {}, "invalid_url", "messages[0].content[0]"),
        ([{"image_url": "http://169.254.169.254/latest"}], {}, "host_not_allowed", "messages[0].content[0]"),
        (
            [{"image_url": "http://127.0.0.1/a"}],
            {"allowed_hosts": ("*",)},
            "host_not_allowed",
            "messages[0].content[0]",
        ),
        ([{"image_url": "file:///etc/passwd"}], {}, "file_not_allowed", "messages[0].content[0]"),
        ([{"image_url": "gopher://x"}], {}, "unsupported_url_scheme", "messages[0].content[0]"),
    ],
)
def test_items_beyond_the_limits_are_refused(content: list[Any], limits: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ServeError) as raised:
        loaded(request(*content), **limits)
    assert (raised.value.code, raised.value.param) == (code, param)
