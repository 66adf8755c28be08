"""The sound files that go to an instance, and the rates that it takes."""

from __future__ import annotations

import base64
import importlib.util
import io
import struct
import sys
import wave
from types import ModuleType
from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.vllm import instance_sounds
from embferry.serve.vllm.instance_digests import InstanceDigests
from embferry.serve.vllm.probe_items import probe_sound
from embferry.serve.vllm.sound_files import MAX_TAGS, checked
from tests.serve.vllm.stubs import Stub, mp4, request, routed

MP3, ADTS = b"\xff\xfb\x90\0", b"\xff\xf1\x50\x80"
WEBM = b"\x1aE\xdf\xa3\x84\x42\x82\x81w"


def tag(nbytes: int = 20, flags: int = 0) -> bytes:
    """Returns a tag of this length (ID3), without its head."""
    size = bytes(nbytes >> 7 * place & 0x7F for place in (3, 2, 1, 0))
    return b"ID3\4\0" + bytes([flags]) + size + bytes(nbytes) + (b"3DI" + bytes(7) if flags else b"")


def wave_file() -> bytes:
    with io.BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setparams((2, 3, 44_100, 0, "NONE", ""))
            writer.writeframes(bytes(600))
        return file.getvalue()


SOUNDS = {
    "WAV": wave_file(),
    "the router's own": base64.b64decode(probe_sound().url.partition(",")[2]),
    "WAV of another order": b"RIFX....WAVE",
    "WAV of 64 bits": b"RF64....WAVE",
    "Wave64": b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + bytes(9),
    "AIFF": b"FORM....AIFFCOMM",
    "compressed AIFF": b"FORM....AIFCFVER",
    "AU": b".snd\0\0\0\x18" + bytes(16),
    "CAF": b"caff\0\1\0\0desc",
    "AMR": b"#!AMR\n",
    "FLAC": b"fLaC\0\0\0\x22",
    "Ogg": b"OggS\0\2" + bytes(22),
    "MP3": MP3 + bytes(400),
    "MP3 without a checksum of a low rate": b"\xff\xe3\x18\xc4",
    "MP2": b"\xff\xfd\x90\0",
    "AAC": ADTS,
    "MP3 after a tag": tag() + MP3,
    "MP3 after a long tag": tag(300_000) + MP3,
    "MP3 after tags and zeros": tag() + tag(7, 0x10) + bytes(1000) + MP3,
    "AAC after a tag": tag(0) + ADTS,
    "FLAC after a tag": tag() + b"fLaC",
    "MP4": mp4(),
    "WebM": WEBM,
}


@pytest.mark.parametrize("form", SOUNDS)
def test_a_sound_goes_to_the_instance_as_it_is(form: str) -> None:
    assert checked(SOUNDS[form]) is SOUNDS[form]


OTHERS = {
    "nothing": (b"", "media_empty"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "wrong_media_kind"),
    "a JPEG": (b"\xff\xd8\xff\xe0", "wrong_media_kind"),
    "a WebP": (b"RIFF....WEBP", "wrong_media_kind"),
    "three bytes": (bytes(3), "unsupported_media_type"),
    "noise": (b"a sound, some would say", "unsupported_media_type"),
    "a PDF": (b"%PDF-1.7", "unsupported_media_type"),
    "a list of files": (b"ffconcat version 1.0\nfile other.wav\n", "unsupported_media_type"),
    "a playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\nother.ts", "unsupported_media_type"),
    "a session": (b"v=0\r\no=- 0 0 IN IP4 10.0.0.1\r\n", "unsupported_media_type"),
    "a manifest": (b"<?xml version='1.0'?><MPD>", "unsupported_media_type"),
    "a list of files after a tag": (tag() + b"ffconcat version 1.0\n", "unsupported_media_type"),
    "a list of files after tags": (tag() * 3 + b"ffconcat version 1.0\n", "unsupported_media_type"),
    "a video after a tag": (tag() + mp4(), "unsupported_media_type"),
    "a tag that is cut off": (tag(500)[:100], "unsupported_media_type"),
    "the beginning of a tag": (b"ID3\4\0", "unsupported_media_type"),
    "more tags than any file has": (tag(0) * (MAX_TAGS + 1) + MP3, "unsupported_media_type"),
    "text in 16 bits": (b"\xff\xfeh\0i\0", "unsupported_media_type"),
    "bits that no version has": (b"\xff\xeb\x90\0", "unsupported_media_type"),
    "MP3 of no rate": (b"\xff\xfb\x9c\0", "unsupported_media_type"),
    "AAC of no rate": (b"\xff\xf1\x7c\x80", "unsupported_media_type"),
    "a container whose index does not fit": (
        mp4() + struct.pack(">I4s", 24, b"moov") + struct.pack(">I4sIi", 16, b"stco", 0, 9),
        "audio_corrupt",
    ),
    "a position beyond all files": (mp4() + struct.pack(">I4sQ", 1, b"free", 1 << 40), "audio_corrupt"),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_sound_is_refused(form: str) -> None:
    data, code = OTHERS[form]
    with pytest.raises(ServeError) as refused:
        checked(data)
    assert refused.value.code == code


@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["a list of files", "a position beyond all files"])
async def test_it_reaches_no_instance(form: str) -> None:
    data, code = OTHERS[form]
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    async with routed(encoder, language, language_encodes=True) as router:
        answer = await router.ask(request(part))
    assert (answer.status, answer.error["code"]) == (415 if "unsupported" in code else 400, code)
    assert answer.error["param"] == "messages[0].content[0]"
    assert encoder.requests + language.requests == []


# Rates


class Vllm(ModuleType):
    """vLLM's module that changes rates, which notes those that it is asked for."""

    def __init__(self) -> None:
        super().__init__(instance_sounds.MODULE)
        self.made: list[tuple[int, int]] = []
        setattr(self, instance_sounds.MAKER, self.make)

    def make(self, orig_sr: int, target_sr: int) -> str:
        self.made.append((orig_sr, target_sr))
        return "a resampler"

    def __call__(self, *rates: int) -> Any:
        return getattr(self, instance_sounds.MAKER)(*rates)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    module = Vllm()
    monkeypatch.setitem(sys.modules, instance_sounds.MODULE, module)
    instance_sounds.protect()
    return module


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000])
@pytest.mark.parametrize("target", [16_000, 24_000, 44_100, 48_000])
def test_usual_rates_are_changed_as_vllm_does(vllm: Vllm, rate: int, target: int) -> None:
    assert vllm(rate, target) == "a resampler"
    assert vllm.made == [(rate, target)]


@pytest.mark.parametrize("rate", [0, -1, 15_999, 44_101, 191_999, (1 << 31) - 1])
def test_a_rate_that_takes_a_large_table_is_refused(vllm: Vllm, rate: int) -> None:
    with pytest.raises(ValueError, match=f"A sound of {rate} samples a second cannot be resampled"):
        vllm(rate, 16_000)
    assert vllm.made == []


def test_the_middleware_bounds_the_rates_of_its_instance_once(vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    before = getattr(vllm, instance_sounds.MAKER)
    InstanceDigests(lambda *_: None)  # type: ignore[arg-type]
    assert getattr(vllm, instance_sounds.MAKER) is before
    delattr(vllm, instance_sounds.MAKER)
    InstanceDigests(lambda *_: None)  # type: ignore[arg-type]
    assert instance_sounds.DANGER in caplog.text


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_vllm_without_the_module_is_told(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, instance_sounds.MODULE, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)
    instance_sounds.protect()
    assert (instance_sounds.DANGER in caplog.text) == is_installed
