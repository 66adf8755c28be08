"""Sounds before vLLM: encode instances encode them, and no instance gets an address or a name of a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embferry.serve.vllm import fitness
from embferry.serve.vllm.connectors import Encoded
from embferry.serve.vllm.early import Offerings
from embferry.serve.vllm.instance import Instance
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.probe_items import probe_sound
from tests.serve.vllm.sound_parts import METADATA, sound, wav
from tests.serve.vllm.stage_stubs import prefilled
from tests.serve.vllm.stubs import (
    SHAPE,
    Answer,
    Behaviour,
    Stub,
    data_url,
    encoded,
    encoder_stubs,
    lost,
    picture,
    refused,
    request,
    routed,
    text,
    until,
    video,
)

pytestmark = pytest.mark.asyncio

ADDRESS = "http://169.254.169.254/latest"
WAV = wav()
DATA = data_url(WAV, "audio/wav")


def said(content: bytes = b"a sound", **more: Any) -> dict[str, Any]:
    """Returns a sound as OpenAI's clients send it."""
    data = data_url(wav(content)).partition(",")[2]
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}, **more}


def content_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = body["messages"][0]["content"]
    return content


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize("beside", [(), (picture(),)], ids=["alone", "beside a picture"])
@pytest.mark.parametrize(
    ("part", "code"),
    [
        (sound() | {"audio_url": {"url": ADDRESS}}, "host_not_allowed"),
        (sound() | {"audio_url": {"url": f"  {ADDRESS}"}}, "host_not_allowed"),
        ({"audio_url": ADDRESS}, "host_not_allowed"),
        ({"audio_url": {"url": ADDRESS}, "uuid": "x"}, "host_not_allowed"),
        ({"type": "zzz", "audio_url": {"url": ADDRESS}}, "host_not_allowed"),
        (sound() | {"audio_url": {"url": "file:///etc/passwd"}}, "file_not_allowed"),
        (sound() | {"audio_url": {"url": "ftp://example.com/x"}}, "unsupported_url_scheme"),
        (sound() | {"audio_url": 5}, "invalid_request"),
        ({"type": "audio_url", "audio_url": {}}, "invalid_request"),
        ({"type": "input_audio", "input_audio": ADDRESS}, "invalid_request"),
        ({"type": "input_audio", "input_audio": {"data": ADDRESS}}, "invalid_url"),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}, "audio_url": DATA},
            "invalid_request",
        ),
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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sound_is_encoded_once_and_the_language_instance_gets_its_length(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "a.wav").write_bytes(WAV)
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    parts = [said(), sound(uuid="theirs"), {"audio_url": (tmp_path / "a.wav").as_uri()}]
    async with routed(encoder, language, media={"allowed_folders": (tmp_path,)}) as router:
        for part in parts:
            assert (await router.ask(request(part, text(), stream=stream))).status == 200
        assert await router.counted("media_items_total", '{kind="audio"}') == 3
        records = (await router.get("/activity")).json()["requests"]
    assert [record["sounds"] for record in records] == [1, 1, 1]
    (asked,) = encoder.requests
    (item,) = content_of(asked)
    assert item == {"type": "audio_url", "audio_url": {"url": DATA}, "uuid": item["uuid"]}
    told = {"type": "audio_embeds", "audio_embeds": METADATA["audio_url"], "uuid": item["uuid"]}
    assert [content_of(body) for body in language.requests] == [[told, text()]] * 3
    assert [list(body["ec_transfer_params"]) for body in language.requests] == [[item["uuid"]]] * 3


async def test_a_model_without_metadata_gets_the_sound_itself() -> None:
    encoder, language = Stub("e", "encode", default=encoded(metadata={})), Stub("l", "language")
    async with routed(encoder, language) as router:
        assert (await router.ask(request(said(uuid="theirs", caption="x"), text()))).status == 200
    (item,) = content_of(encoder.requests[0])
    assert content_of(language.requests[0]) == [{**item, "caption": "x"}, text()]
    assert language.requests[0]["ec_transfer_params"][item["uuid"]]["embferry"]["endpoint"]


async def test_kinds_are_mixed_in_the_order_of_the_prompt() -> None:
    encoders, language = encoder_stubs(2), Stub("l", "language")
    parts = [text(), sound(b"a"), picture(b"a"), said(b"b"), video(), sound(b"a"), text()]
    async with routed(*encoders, language) as router:
        assert (await router.ask(request(*parts))).status == 200
    sent = content_of(language.requests[0])
    kinds = ["text", "audio_embeds", "image_embeds", "audio_embeds", "video_url", "audio_embeds", "text"]
    assert [part["type"] for part in sent] == kinds
    assert sent[1] == sent[5] != sent[3]
    assert len(language.requests[0]["ec_transfer_params"]) == 4
    assert sum(len(encoder.requests) for encoder in encoders) == 4


async def test_a_sound_goes_to_another_encoder_when_one_is_lost() -> None:
    encoders, language = encoder_stubs(2), Stub("l", "language")
    for encoder in encoders:
        encoder.default = once(lost(), encoders)
    async with routed(*encoders, language) as router:
        assert (await router.ask(request(said(), text()))).status == 200
        assert await router.counted("encode_retries_total") == 1
    assert content_of(language.requests[0])[0]["type"] == "audio_embeds"


def once(behaviour: Behaviour, stubs: list[Stub]) -> Behaviour:
    """Behaves so at the first request that any of these stubs gets, and encodes the others."""

    async def behave(stub: Stub, body: dict[str, Any]) -> Any:
        is_first = sum(len(one.requests) for one in stubs) == 1
        return await (behaviour if is_first else encoded())(stub, body)

    return behave


@pytest.mark.parametrize(
    ("message", "said_plainly"),
    [
        ("The audio (len=0) is too short to be represented inside the model", "no samples, or too few"),
        ("Invalid or unsupported audio file.", "it is damaged, or its format is not read there"),
        ("Invalid or corrupted audio data. Ensure", "it is damaged, or its format is not read there"),
        ("No audio found in the input.", "there is no sound in it"),
    ],
)
async def test_a_sound_that_vllm_cannot_read_is_refused(message: str, said_plainly: str) -> None:
    encoder, language = Stub("e", "encode", default=refused(400, message=message)), Stub("l", "language")
    async with routed(encoder, language) as router:
        answer = await router.ask(request(text(), said()))
    assert (answer.status, answer.error["code"]) == (400, "audio_corrupt")
    assert answer.error["param"] == "messages[0].content[1]"
    assert said_plainly in answer.error["message"]
    assert language.requests == []


async def test_a_model_that_takes_no_sound_answers_as_it_would_undivided() -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    encoder.default = refused(400, message="At most 0 audio(s) may be provided in one prompt.")
    async with routed(encoder, language, language_encodes=True) as router:
        answer = await router.ask(request(text(), said()))
    assert (answer.status, answer.error["message"]) == (400, "At most 0 audio(s) may be provided in one prompt.")
    assert language.requests == []


async def test_the_language_instance_encodes_where_no_encoder_does() -> None:
    encoder, language = Stub("e", "encode", default=refused(503)), Stub("l", "language")
    async with routed(encoder, language, language_encodes=True) as router:
        assert (await router.ask(request(said(uuid="theirs"), text()))).status == 200
        assert await router.counted("fallbacks_total") == 1
    (item,) = content_of(encoder.requests[0])
    assert content_of(language.requests[0]) == [item, text()]
    assert item["uuid"] != "theirs"
    assert "ec_transfer_params" not in language.requests[0]


async def test_without_an_encoder_a_sound_is_refused_and_a_text_answered() -> None:
    encoder, language = Stub("e", "encode", up=False), Stub("l", "language")
    async with routed(encoder, language) as router:
        answer = await router.ask(request(said(), text()))
        assert (answer.status, answer.error["code"]) == (503, "no_worker")
        assert (await router.ask(request(text()))).status == 200
    assert len(language.requests) == 1


async def test_a_decode_instance_gets_the_same_as_the_prefill_instance() -> None:
    stubs = Stub("e", "encode"), Stub("p", "prefill", default=prefilled()), Stub("d", "decode")
    async with routed(*stubs) as router:
        assert (await router.ask(request(said(), text()))).status == 200
    _, prefill, decode = stubs
    assert content_of(prefill.requests[0]) == content_of(decode.requests[0])
    assert content_of(decode.requests[0])[0]["type"] == "audio_embeds"


@pytest.mark.parametrize("path", ["/v1/responses", "/tokenize", "/v1/completions"])
async def test_a_sound_at_another_path_is_refused(path: str) -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    field = "input" if path == "/v1/responses" else "messages"
    async with routed(encoder, language) as router:
        for part in (said(), sound(), {"audio_url": ADDRESS}):
            body = {"model": "tiny", field: [{"role": "user", "content": [part]}]}
            answer = await router.call(body, path).answer()
            assert (answer.status, answer.error["code"]) == (400, "unsupported_value")
    assert encoder.requests + language.requests == []


async def test_sounds_have_the_limits_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(bytes(2000))
    language = Stub("l", "language")
    limits = {"allowed_folders": (tmp_path,), "max_bytes": 1000, "max_images": 2, "max_total_bytes": 1500}
    async with routed(Stub("e", "encode"), language, media=limits) as router:
        for parts, code in (
            ([{"audio_url": (tmp_path / "a.wav").as_uri()}], "media_too_large"),
            ([sound(bytes(1500))], "media_too_large"),
            ([said(bytes(1500))], "media_too_large"),
            ([sound(bytes(900)), said(bytes(900))], "media_too_large"),
            ([said(bytes(9)), sound(bytes(9)), said(bytes(8))], "too_many_sounds"),
        ):
            answer = await router.ask(request(*parts))
            assert (answer.status, answer.error["code"]) == (413 if code == "media_too_large" else 400, code)
    assert language.requests == []


# Names that clients give


def named(uuid: str = "x", kind: str = "input_audio") -> dict[str, Any]:
    return {"type": kind, kind: None, "uuid": uuid}


def unknown(answer: Answer) -> bool:
    return (answer.status, answer.error["code"]) == (400, "unknown_media_uuid")


@pytest.mark.parametrize(
    "form",
    [
        named(),
        named(kind="audio_url"),
        {"type": "input_audio", "uuid": "x"},
        {"type": "input_audio", "input_audio": {"data": None, "format": "wav"}, "uuid": "x"},
        {"input_audio": {}, "uuid": "x"},
        {"audio_url": {"url": None}, "uuid": "x"},
    ],
)
async def test_a_sound_by_its_name_alone(form: dict[str, Any]) -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    async with routed(encoder, language) as router:
        assert unknown(await router.ask(request(form)))
        first = await router.ask(request(said(uuid="x"), text()))
        assert "embferry-ignored-fields" not in first.headers
        assert (await router.ask(request(form, text()))).status == 200
    assert language.requests[0]["messages"] == language.requests[1]["messages"]
    assert len(encoder.requests) == 1
    assert content_of(language.requests[0])[0]["uuid"] != "x"


async def test_a_name_is_one_of_its_kind_and_of_its_client() -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    async with routed(encoder, language) as router:
        assert (await router.ask(request(said(uuid="x"), picture(uuid="y")), Authorization="Bearer a")).status == 200
        for other in (named("y"), {"type": "image_url", "image_url": None, "uuid": "x"}):
            assert unknown(await router.ask(request(other), Authorization="Bearer a"))
        assert unknown(await router.ask(request(named()), Authorization="Bearer b"))
        assert (await router.ask(request(said(b"b", uuid="x")), Authorization="Bearer b")).status == 200
        for key in ("a", "b"):
            assert (await router.ask(request(named()), Authorization=f"Bearer {key}")).status == 200
    uuids = [content_of(body)[0]["uuid"] for body in language.requests]
    assert uuids[0] == uuids[2] != uuids[1] == uuids[3]


async def test_without_kept_names_a_sounds_name_is_ignored() -> None:
    language = Stub("l", "language")
    async with routed(Stub("e", "encode"), language, uuid_bytes=0) as router:
        answer = await router.ask(request(said(uuid="x")))
    assert answer.headers["embferry-ignored-fields"] == "messages[0].content[0].uuid"
    assert content_of(language.requests[0])[0]["uuid"] != "x"


# Instances that fail


async def test_an_instance_that_encodes_no_sound_is_to_blame_itself() -> None:
    encoders, language = encoder_stubs(2), Stub("l", "language")
    for encoder in encoders:
        encoder.default = of_sounds(refused(500))
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(said()))
        assert (answer.status, answer.error["code"]) == (502, "worker_failed")
    sent = [content_of(body)[0] for encoder in encoders for body in encoder.requests]
    assert {part["type"] for part in sent} == {"audio_url"}  # it was tried with a sound of the router's own
    assert len({part["uuid"] for part in sent}) == 2


def of_sounds(behaviour: Behaviour) -> Behaviour:
    async def behave(stub: Stub, body: dict[str, Any]) -> Any:
        is_sound = content_of(body)[0]["type"] == "audio_url"
        return await (behaviour if is_sound else encoded())(stub, body)

    return behave


async def test_a_sound_that_ends_two_instances_is_given_to_no_other() -> None:
    encoders, language = encoder_stubs(3), Stub("l", "language")

    async def ends(stub: Stub, body: dict[str, Any]) -> Any:
        stub.up = False
        return await lost()(stub, body)

    for encoder in encoders:
        encoder.default = ends
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(said()))
    assert (answer.status, answer.error["code"]) == (400, "media_decoder_failed")
    assert "2 instances ended while they encoded this sound" in answer.error["message"]
    assert sum(encoder.up for encoder in encoders) == 1


async def test_an_instance_that_takes_sounds_alone_is_tested_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "AGAIN_SECONDS", 0.01)
    (bad, good), language = encoder_stubs(2), Stub("l", "language")
    fails = True

    async def sounds_alone(stub: Stub, body: dict[str, Any]) -> Any:
        if content_of(body)[0]["type"] != "audio_url":
            return await refused(400, message="At most 0 image(s) may be provided in one prompt.")(stub, body)
        return await (refused(500) if fails and stub is bad else encoded())(stub, body)

    bad.default = good.default = sounds_alone
    async with routed(bad, good, language) as router:

        async def usable() -> int:
            return int((await router.get("/ready")).json()["workers"]["encode"])

        number = 0
        while await usable() == 2:
            number += 1
            assert number < 200
            assert (await router.ask(request(said(b"%d" % number)))).status == 200
        fails = False

        async def are_both() -> bool:
            return await usable() == 2

        await until(are_both)


async def test_the_routers_own_sound_is_a_wav_file_and_a_new_one_each_time() -> None:
    import base64
    import io
    import wave

    one, other = probe_sound(), probe_sound()
    assert one.kind == "audio"
    assert one.uuid != other.uuid
    assert one.url != other.url
    with wave.open(io.BytesIO(base64.b64decode(one.url.partition(",")[2]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, 4000)


async def test_what_is_known_of_pictures_is_not_taken_for_sounds() -> None:
    """The embeddings of a model's sounds may have another width than those of its pictures."""
    offerings, encoder = Offerings(), Instance("http://e", "encode")
    image, audio = Item("image", "a", "data:,"), Item("audio", "b", "data:,")
    for item, width, metadata in ((image, 512, {}), (audio, 128, {}), (image, 512, {})):
        entry = {"metadata": metadata, "embferry": {**SHAPE, "endpoint": "tcp://e:1", "room": 1, "width": width}}
        offerings.learn(Encoded(item, encoder, encoder.incarnation, item.uuid, entry))
    expected = [offerings.expected(encoder, item, takes_files=True) for item in (image, audio)]
    assert [one.entry["embferry"]["width"] for one in expected if one is not None] == [512, 128]
    assert offerings.expected(encoder, Item("video", "c", "data:,"), takes_files=True) is None
