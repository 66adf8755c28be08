"""Sounds at real instances of ``vllm serve`` behind the router: a tiny Qwen2-Audio, divided and whole."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serve.vllm import tiny_audio
from tests.serve.vllm.servers import ENCODERS, GREEDY, MORE, Servers, picture, until
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]


def said(seed: int, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    """Returns a sound as OpenAI's clients send it."""
    data = base64.b64encode(tiny_audio.sound(seed, seconds)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}, **more}


def heard(seed: int, seconds: float = 1.0) -> dict[str, Any]:
    """Returns the same as a URL of data."""
    return {
        "type": "audio_url",
        "audio_url": {"url": f"data:audio/wav;base64,{said(seed, seconds)['input_audio']['data']}"},
    }


CONTENTS = {
    "data": [said(1), text()],
    "a URL of data": [heard(2, 2.5), text()],
    "three, one of them twice": [said(3), text("and"), heard(4, 0.3), said(3), text()],
    "longer than the model takes": [said(5, 40), text()],
    "none": [text()],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    """Yields the URL of a web site with sounds, at an address that the router may fetch from."""

    class Site(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder / "site"))

        def log_message(self, *_: object) -> None:
            pass

    (folder / "site").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def servers(folder: Path, site: str) -> Iterator[Servers]:
    started = Servers(folder, make=tiny_audio.make, EMBFERRY_MEDIA_ALLOWED_HOSTS=site.removeprefix("http://"))
    try:
        started.wait("ready:")
        started.wait("the undivided model", f"{started.undivided}/health")
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
def test_the_tokens_are_those_of_the_undivided_model(servers: Servers, what: str, stream: bool) -> None:
    expected = servers.tokens(servers.undivided, *CONTENTS[what])
    assert len(expected) == 16
    assert servers.tokens(servers.url, *CONTENTS[what], stream=stream) == expected


def test_an_answer_depends_on_the_sound(servers: Servers) -> None:
    one, other = (servers.tokens(servers.url, said(seed), text()) for seed in (1, 6))
    assert one != other


def test_a_sound_is_encoded_once_in_whatever_form_it_comes(servers: Servers, site: str, folder: Path) -> None:
    (folder / "site" / "seven.wav").write_bytes(tiny_audio.sound(7))
    fetched = {"type": "audio_url", "audio_url": {"url": f"{site}/seven.wav"}}
    before = servers.counted("encodes_total"), servers.received_by("language-0")
    answers = [servers.tokens(servers.url, part, text()) for part in (fetched, said(7), heard(7), fetched)]
    assert answers == [servers.tokens(servers.undivided, said(7), text())] * 4
    assert servers.counted("encodes_total") == before[0] + 1
    until(lambda: servers.received_by("language-0") == before[1] + 1)


def test_a_sound_by_its_name_alone(servers: Servers) -> None:
    named = {"type": "input_audio", "input_audio": None, "uuid": "mine"}
    expected = [servers.tokens(servers.undivided, said(seed), text()) for seed in (10, 11)]
    assert servers.tokens(servers.url, said(10, uuid="mine"), text()) == expected[0]
    assert servers.tokens(servers.url, named, text()) == expected[0]
    assert servers.tokens(servers.url, said(11, uuid="mine"), text()) == expected[1]
    assert servers.tokens(servers.url, named, text()) == expected[1]


def test_usage_and_logprobs_are_those_of_vllm(servers: Servers) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": CONTENTS["data"]}], **GREEDY}
    with servers.client(servers.url) as split, servers.client(servers.undivided) as undivided:
        ours, theirs = (
            client.chat.completions.create(**asked, logprobs=True, extra_body=MORE) for client in (split, undivided)
        )
    assert ours.usage == theirs.usage
    assert ours.choices == theirs.choices


FORMATS = [
    *(("WAV", form) for form in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
    *(("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16")),
    *(("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")),
]


@pytest.mark.parametrize(
    ("form", "channels"),
    [(form, channels) for form in FORMATS for channels in (1, 2, 6) if form[0] != "MP3" or channels <= 2],
)
def test_every_format_is_answered_as_undivided(servers: Servers, form: tuple[str, str], channels: int) -> None:
    part = encoded(tiny_audio.written(channels, *form, channels=channels), form[0].lower())
    assert servers.tokens(servers.url, part, text()) == servers.tokens(servers.undivided, part, text())


def encoded(data: bytes, form: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


@pytest.mark.parametrize("form", ["wav", "mp3", "../x", "wav;base64,AAAA"])
def test_the_format_that_a_client_names_has_no_effect(servers: Servers, form: str) -> None:
    part = encoded(tiny_audio.written(8, "FLAC", "PCM_16"), form)
    expected = servers.tokens(servers.undivided, encoded(tiny_audio.written(8, "FLAC", "PCM_16")), text())
    assert servers.tokens(servers.url, part, text()) == expected


WAV = tiny_audio.sound(9)


@cache
def flac() -> bytes:
    return tiny_audio.written(9, "FLAC", "PCM_16", seconds=3)


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


CUT = {
    "samples that are missing": WAV[:20_000],
    "a length of hours": with_bytes(WAV, 40, (230_400_000).to_bytes(4, "little")),
}


@pytest.mark.parametrize("what", CUT)
def test_what_is_left_of_a_cut_sound_is_answered_as_undivided(servers: Servers, what: str) -> None:
    part = encoded(CUT[what])
    assert servers.tokens(servers.url, part, text()) == servers.tokens(servers.undivided, part, text())


def streaminfo(samples: int) -> bytes:
    """Returns the FLAC file with another number of samples in its head."""
    field = int.from_bytes(flac()[18:26]) >> 36 << 36 | samples
    return with_bytes(flac(), 18, field.to_bytes(8))


REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "three bytes": (lambda: bytes(3), 415, "the format of the bytes is unknown"),
    "a list of files": (lambda: b"ffconcat version 1.0\nfile config.json\n", 415, "the format of the bytes is unknown"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), 400, "a PNG picture"),
    "no samples": (lambda: tiny_audio.sound(1, 0), 400, "no samples, or too few"),
    "one sample": (lambda: tiny_audio.sound(1, 1 / tiny_audio.RATE), 400, "no samples, or too few"),
    "a head alone": (lambda: WAV[:30], 400, "cannot be encoded, by instances that encode another sound"),
    "half a FLAC": (
        lambda: flac()[: len(flac()) // 2],
        400,
        "cannot be encoded, by instances that encode another sound",
    ),
    "a damaged FLAC": (lambda: with_bytes(flac(), 5000, bytes(2000)), 400, "by instances that encode another sound"),
    "noise": (lambda: b"fLaC" + WAV, 400, "cannot be encoded, by instances that encode another sound"),
    "no channels": (lambda: with_bytes(WAV, 22, bytes(2)), 400, "by instances that encode another sound"),
    "no rate": (lambda: with_bytes(WAV, 24, bytes(4)), 400, "by instances that encode another sound"),
    "a rate whose table is large": (
        lambda: with_bytes(WAV, 24, (15_999).to_bytes(4, "little")),
        400,
        "cannot be resampled",
    ),
    "the greatest rate": (lambda: with_bytes(WAV, 24, b"\xff\xff\xff\x7f"), 400, "cannot be resampled"),
    "an hour in a head": (lambda: streaminfo(3600 * tiny_audio.RATE), 400, "exceeds maximum allowed duration"),
    "an unknown length": (lambda: streaminfo(0), 400, "exceeds maximum allowed duration"),
    "an hour of silence": (lambda: tiny_audio.silence(3600), 400, "exceeds maximum allowed duration"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_encoded_is_refused(servers: Servers, what: str) -> None:
    import openai

    data, status, message = REFUSED[what]
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        servers.tokens(servers.url, encoded(data()), text())
    assert refused.value.status_code == status
    assert " at 0x" not in str(refused.value)
    assert len(servers.up()) == ENCODERS


@pytest.mark.parametrize(
    "content", [[said(1), picture(1), text()], [picture(1), text()]], ids=["beside a sound", "alone"]
)
def test_a_picture_for_a_model_of_sounds_is_refused_as_undivided(servers: Servers, content: list[Any]) -> None:
    assert refusal(servers, servers.url, content) == refusal(servers, servers.undivided, content)


def refusal(servers: Servers, url: str, content: list[Any]) -> str:
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        servers.tokens(url, *content)
    return str(refused.value.body)


def test_what_is_no_base64_is_refused(servers: Servers) -> None:
    import openai

    part = {"type": "input_audio", "input_audio": {"data": "@@@@", "format": "wav"}}
    with pytest.raises(openai.BadRequestError, match="not base64"):
        servers.tokens(servers.url, part, text())


def test_concurrent_requests_are_answered_correctly(servers: Servers) -> None:
    contents = [[said(20 + number % 4, 0.5 + number % 4), text(f"question {number}")] for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda content: servers.tokens(servers.url, *content), contents))
    assert found == [servers.tokens(servers.undivided, *content) for content in contents]


def test_a_sound_of_a_killed_encoder_comes_from_the_other_one(servers: Servers) -> None:
    contents = [[said(30 + number, 20), text()] for number in range(3)]
    before = {name: servers.encoded_by(name) for name in servers.up()}
    failovers = servers.counted("failovers_total")
    with ThreadPoolExecutor(len(contents)) as pool:
        with servers.held("language-0"):
            asked = [pool.submit(servers.tokens, servers.url, *content) for content in contents]
            until(lambda: sum(map(servers.encoded_by, before)) == sum(before.values()) + len(contents))
            had, name = max((int(servers.encoded_by(name) - before[name]), name) for name in before)
            servers.kill(name)
        answers = [one.result() for one in asked]
    assert answers == [servers.tokens(servers.undivided, *content) for content in contents]
    assert servers.counted("failovers_total") - failovers == had
