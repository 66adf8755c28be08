"""Which files go to an instance as videos: an instance decodes them in the process that serves all of its requests."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from PIL import Image

from embferry.serve.errors import ServeError
from embferry.serve.vllm import instance_videos
from embferry.serve.vllm.instance_digests import InstanceDigests
from embferry.serve.vllm.instance_videos import SeekableBytes
from embferry.serve.vllm.video_files import checked
from tests.serve.vllm.stubs import data_url, encoder_stubs, language_stubs, mp4, picture, request, routed, video


def frames() -> Iterator[Image.Image]:
    for number in range(4):
        yield Image.effect_noise((64, 48), 50 + number).convert("RGB")


def animated(form: str) -> bytes:
    first, *rest = frames()
    data = io.BytesIO()
    first.save(data, form, save_all=True, append_images=rest, duration=100)
    return data.getvalue()


def still(form: str) -> bytes:
    data = io.BytesIO()
    next(frames()).save(data, form)
    return data.getvalue()


HEADS = {
    "MP4": mp4(),
    "QuickTime": b"\0\0\0\x08wide" + mp4(),
    "Matroska": b"\x1aE\xdf\xa3\x80",
    "MPEG-TS": (b"G" + bytes(187)) * 4,
    "MPEG-PS": b"\0\0\1\xba" + bytes(40),
    "FLV": b"FLV\1\5\0\0\0\x09",
    "Ogg": b"OggS\0" + bytes(40),
    "AVI": b"RIFF\x04\0\0\0AVI ",
}


@pytest.mark.parametrize("name", [*HEADS, "GIF"])
def test_containers_of_videos_go_to_an_instance_as_they_are(name: str) -> None:
    data = HEADS.get(name) or animated("GIF")
    assert checked(data) is data


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [1.0, 0.9, 0.5, 0.1])
def test_animated_pictures_are_no_videos_before_vllm_whole_or_cut(form: str, part: float) -> None:
    data = animated(form)
    with pytest.raises(ServeError) as raised:
        checked(data[: int(len(data) * part)])
    assert (raised.value.code, raised.value.http_status) == ("unsupported_media_type", 415)
    assert "as MP4, WebM or GIF" in raised.value.detail


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "media_empty"),
        (b"no file at all", "unsupported_media_type"),
        (b"#EXTM3U\nhttp://169.254.169.254/", "unsupported_media_type"),
        (b"ffconcat version 1.0\nfile /etc/passwd", "unsupported_media_type"),
        (still("JPEG"), "wrong_media_kind"),
        (still("BMP"), "wrong_media_kind"),
        (still("GIF"), "wrong_media_kind"),
        (b"\0\0\0\x18ftypavifmif1", "wrong_media_kind"),
        (b"RIFF\xf0\xff\xff\xffAVI LIST\xf0\xff\xff\xffmovi", "video_corrupt"),
        (mp4() + b"\xff\0\0\0free", "video_corrupt"),
    ],
)
@pytest.mark.asyncio
async def test_the_router_refuses_what_no_instance_should_read(data: bytes, code: str) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    part = {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}
    async with routed(encoder, language) as router:
        answer = await router.ask(request(part))
    assert 400 <= answer.status < 500
    assert (answer.error["code"], answer.error["param"]) == (code, "messages[0].content[0]")
    assert encoder.requests + language.requests == []
    if code == "unsupported_media_type":
        assert "supported are MP4/QuickTime" in answer.error["message"]


@pytest.mark.asyncio
async def test_a_video_as_a_picture_is_refused() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(mp4())))
    assert (answer.status, answer.error["code"]) == (400, "wrong_media_kind")
    assert encoder.requests == []


@pytest.mark.asyncio
async def test_metadata_of_asf_does_not_reach_an_instance() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    head = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c" + (30).to_bytes(8, "little") + bytes(6)
    content = head + b"of no use to us." + (30).to_bytes(8, "little") + b"length"
    part = {"type": "video_url", "video_url": {"url": data_url(content, "video/x-ms-wmv")}}
    async with routed(encoder, language, media={"max_bytes": 1000}) as router:
        assert (await router.ask(request(part))).status == 200
    sent = encoder.requests[0]["messages"][0]["content"][0]["video_url"]["url"]
    assert b"of no use" not in base64.b64decode(sent.partition(",")[2])


@pytest.mark.asyncio
async def test_a_fetched_video_is_checked_like_one_inline(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a").write_bytes(animated("PNG"))
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    part = {"type": "video_url", "video_url": {"url": (folder / "a").as_uri()}}
    async with routed(encoder, language, media={"allowed_folders": (folder,)}) as router:
        answer = await router.ask(request(part))
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.asyncio
async def test_videos_of_the_same_bytes_have_one_name() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        for _ in range(2):
            await router.ask(request(video()))
    assert len(encoder.requests) == 1


def test_an_impossible_seek_is_answered_as_c_does() -> None:
    file = SeekableBytes(b"abc")
    assert [file.seek(-5), file.seek(-(1 << 62)), file.seek(1 << 80)] == [-1, -1, -1]
    assert (file.seek(1), file.read(1), file.seek(0, 2), file.seek(5)) == (1, b"b", 3, 5)


def test_the_middleware_protects_the_reader_of_its_instance(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ModuleType(instance_videos.READER)
    monkeypatch.setitem(sys.modules, instance_videos.READER, reader)
    reader.BytesIO = io.BytesIO  # type: ignore[attr-defined]
    for _ in range(2):
        InstanceDigests(lambda *_: None)  # type: ignore[arg-type]
        assert reader.BytesIO is SeekableBytes
    assert instance_videos.__name__ not in {record.name for record in caplog.records}
    reader.BytesIO = None  # type: ignore[attr-defined]
    InstanceDigests(lambda *_: None)  # type: ignore[arg-type]
    assert instance_videos.DANGER in caplog.text


READ = """
import io, sys
from PIL import Image
from embferry.serve.vllm.instance_videos import protect
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
if "protected" in sys.argv:
    protect()
data = sys.stdin.buffer.read()
for end in range(40, len(data) + 1, 31):
    try:
        VideoMediaIO(ImageMediaIO()).load_bytes(data[:end])
    except Exception:
        pass
print("survived")
"""


@pytest.mark.vllm_http
@pytest.mark.timeout(600)
@pytest.mark.parametrize("protected", [True, False])
def test_vllms_own_reader_survives_cut_files(protected: bool) -> None:
    """Without the protection it does not: if it does one day, the protection has had its time."""
    words = [sys.executable, "-c", READ, *(["protected"] if protected else [])]
    read = subprocess.run(words, input=animated("PNG"), capture_output=True, check=False, timeout=500)
    assert (b"survived" in read.stdout) is protected, read.stderr[-2000:]
    assert (read.returncode == 0) is protected
