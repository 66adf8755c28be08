"""The plug-in inside an encoder's modules: what it does not encode, does not keep, and says of videos."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.connectors.sglang.encoder_side import EncoderSide
from embferry.connectors.sglang.outgoing import OutgoingPart
from embferry.connectors.sglang.parts import PartId
from embferry.connectors.sglang.request_trace import RequestTrace
from embferry.connectors.shared.shape import digest_of
from embferry.traces.spans import Span, Tracer
from tests.traces.recorded import OUTER, client_span, outline

from .both_sides import NAME, SETTINGS, SHAPE, WIDTH, rows_of

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # warnings of SGLang and torch, when SGLang is imported without a GPU
]


def submitted(abandon: bool) -> tuple[Any, list[str]]:
    """Returns the outcome of a part that waits to be encoded, and the parts that were encoded."""
    from sglang.srt.disaggregation.encoder import server

    from embferry.connectors.sglang.inside import encoder

    encoded: list[str] = []

    async def original(scheduler: Any, request: dict[str, Any]) -> str:
        await scheduler.wait()
        encoded.append(request["req_id"])
        return "done"

    async def run() -> Any:
        turn = asyncio.Event()
        task = asyncio.create_task(encoder.submit(original, turn, {"req_id": "a"}))
        await asyncio.sleep(0)
        if abandon:
            encoder._submitted["a"].cancel()
        turn.set()
        try:
            return await task
        except server.MMError as error:
            return error

    return asyncio.run(run()), encoded


def test_a_part_that_is_abandoned_while_it_waits_is_not_encoded() -> None:
    from sglang.srt.disaggregation.encoder import server

    outcome, encoded = submitted(abandon=True)
    assert isinstance(outcome, server.MMError)
    assert outcome.code == 499
    assert encoded == []
    assert submitted(abandon=False) == ("done", ["a"])


def test_a_part_that_is_given_up_during_an_encode_is_not_in_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop reads that it is given up after the encode, which occupies it."""
    from sglang.srt.disaggregation.encoder.runtime import EncoderScheduler

    from embferry.connectors.sglang.inside import encoder

    encoded: list[str] = []
    waiting: list[asyncio.Task[Any]] = []

    async def batch_encode(requests: list[dict[str, Any]], modality: Any) -> list[Any]:
        encoded.extend(request["req_id"] for request in requests)
        asyncio.get_running_loop().call_soon(waiting[-1].cancel)
        return [(0, 0, 0, None, None)]

    collect = EncoderScheduler._collect_batch
    monkeypatch.setattr(EncoderScheduler, "_collect_batch", lambda self: encoder.collect_batch(collect, self))

    async def run() -> None:
        scheduler = EncoderScheduler(
            SimpleNamespace(batch_encode=batch_encode, encode_dispatch_lock=asyncio.Lock()), [], max_batch_size=1
        )
        for text in ("first", "second"):
            request = {"req_id": text, "mm_items": ["picture"], "modality": "IMAGE", "num_parts": 1, "part_idx": 0}
            waiting.append(asyncio.create_task(scheduler.submit(request)))
        await asyncio.sleep(0)
        scheduler.start()
        await waiting[0]
        await asyncio.gather(*waiting, return_exceptions=True)
        await scheduler.stop()

    asyncio.run(run())
    assert encoded == ["first"]


class FakeEncoder:
    """In the place of SGLang's encoder.

    Attributes:
        released: The parts that were given up.
        forgotten: Those of them that SGLang need not remember any more.
    """

    def __init__(self) -> None:
        self.released: list[str] = []
        self.forgotten: list[str] = []
        self.has_released = asyncio.Event()

    async def abandon_request(self, text: str) -> None:
        self.released.append(text)
        self.has_released.set()

    def clear_abandoned_request(self, text: str) -> None:
        self.forgotten.append(text)


@pytest.fixture
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    from sglang.srt.disaggregation.encoder import http_server

    from embferry.connectors.sglang.inside import encoder

    made = FakeEncoder()
    monkeypatch.setattr(http_server, "encoder", made)
    monkeypatch.setattr(encoder, "_unwanted", type(encoder._unwanted)())
    return made


def test_a_dispatcher_that_hangs_up_ends_what_is_kept_for_it(fake_encoder: FakeEncoder) -> None:
    from embferry.connectors.sglang.inside import encoder, encoder_http

    encoding, hung_up = asyncio.Event(), asyncio.Event()

    async def kept(enc: Any, scheduler: Any, request: dict[str, Any]) -> None:
        encoding.set()
        await fake_encoder.has_released.wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        await encoder.pipeline(kept, None, None, {"req_id": "a"})

    messages = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        request = asyncio.create_task(
            encoder_http.EncodeCalls(app)({"type": "http", "path": "/encode", "headers": []}, receive, None)
        )
        await encoding.wait()
        assert not fake_encoder.released
        hung_up.set()
        await asyncio.wait_for(request, 60)

    asyncio.run(run())
    assert fake_encoder.released == ["a"]


def test_a_part_that_is_given_up_before_it_is_asked_for_is_not_encoded(fake_encoder: FakeEncoder) -> None:
    from sglang.srt.disaggregation.encoder import server

    from embferry.connectors.sglang.inside import encoder

    async def run() -> None:
        await encoder.give_up("a")
        with pytest.raises(server.MMError, match="does not want this part"):
            await encoder.pipeline(pytest.fail, None, None, {"req_id": "a"})  # type: ignore[arg-type]

    asyncio.run(run())


def test_an_error_does_not_repeat_the_picture(fake_encoder: FakeEncoder) -> None:
    """The dispatcher reads answers up to a bound only, and would take the encoder for lost."""
    from sglang.srt.disaggregation.encoder import server

    from embferry.connectors.sglang.inside import encoder

    async def fail(enc: Any, scheduler: Any, request: dict[str, Any]) -> None:
        picture = f"data:image/png;base64,{'A' * (2 << 20)}"
        raise server.BadRequestError(f"Error while loading data {picture}: it is truncated")

    with pytest.raises(server.MMError) as told:
        asyncio.run(encoder.pipeline(fail, None, None, {"req_id": "a"}))
    cut = "data:image/png;base64," + "A" * 38
    assert (str(told.value), told.value.code) == (f"Error while loading data {cut}… it is truncated", 400)


def test_parts_that_were_given_up_are_remembered_up_to_a_bound(
    fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embferry.connectors.sglang.inside import encoder

    monkeypatch.setattr(encoder, "MAX_UNWANTED", 2)

    async def run() -> None:
        for text in ("a", "b", "c"):
            await encoder.give_up(text)

    asyncio.run(run())
    assert [text for text in "abc" if encoder.is_unwanted(text)] == ["b", "c"]
    assert fake_encoder.forgotten == ["a"]


@pytest.mark.parametrize(("model", "audio"), [("qwen2_audio", 4096), ("qwen3_omni_moe", 1280)])
def test_the_width_of_audio_is_that_of_the_embeddings(model: str, audio: int) -> None:
    from sglang.srt.managers.schedule_batch import Modality

    from embferry.connectors.sglang.inside import encoder

    made = SimpleNamespace(model_type=model, model_config=SimpleNamespace(hidden_size=4096))
    dims = encoder.embedding_dims(lambda _: {Modality.IMAGE: 4096, Modality.AUDIO: 1280}, made)
    assert dims == {Modality.IMAGE: 4096, Modality.AUDIO: audio}


@pytest.mark.parametrize(
    ("rate", "model", "seconds"),
    [("sampled", "qwen2_5_vl", 1.0), ("undivided", "qwen2_5_vl", 2 / 24), ("undivided", "qwen3_omni_moe", 1.0)],
)
def test_videos_have_the_times_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, rate: str, model: str, seconds: float
) -> None:
    """2 / 24: what transformers' processor says of a video whose frame rate it is not told; a position has 2 frames."""
    import torch

    from embferry.connectors.sglang.inside import videos

    async def original(preprocessor: Any, items: Any) -> dict[str, Any]:
        return {"second_per_grid_ts": torch.ones(2)}

    monkeypatch.setattr(videos, "settings", lambda: SimpleNamespace(video_rate=rate))
    preprocessor = SimpleNamespace(model_type=model, video_processor=SimpleNamespace(temporal_patch_size=2))
    result = asyncio.run(videos.process_video_items(original, preprocessor, []))
    assert result["second_per_grid_ts"].tolist() == pytest.approx([seconds, seconds])


def stages_of(monkeypatch: pytest.MonkeyPatch, original: Callable[[OutgoingPart], Coroutine[Any, Any, None]]) -> str:
    """Returns the spans of a call to encode a part, in whose place the function runs."""
    from sglang.srt.disaggregation.encoder import server

    from embferry.connectors.sglang.inside import encoder

    seen: list[Span] = []
    side = EncoderSide(SETTINGS, {"IMAGE": WIDTH}, "float32")
    monkeypatch.setattr(encoder, "side", [side])
    part = PartId("rid", NAME, 0)

    async def encode(enc: Any, scheduler: Any, request: dict[str, Any]) -> None:
        await original(side.parts.get(part))

    async def run() -> None:
        encoder.called_for.set(RequestTrace(Tracer(seen.append), client_span()))
        with contextlib.suppress(server.MMError):
            await encoder.pipeline(encode, None, None, {"req_id": part.text})

    try:
        asyncio.run(run())
    finally:
        side.close()
    return outline(seen, OUTER)


def test_the_stages_of_a_part_that_is_encoded_have_no_errors(
    fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(part: OutgoingPart) -> None:
        part.announce(SHAPE)
        part.encoded(SHAPE, rows_of(1), digest_of(rows_of(1), SHAPE).hex())

    assert stages_of(monkeypatch, encode) == "prepare encoder"


@pytest.mark.parametrize("is_announced", [False, True])
def test_a_part_that_cannot_be_encoded_ends_its_stage(
    fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, is_announced: bool
) -> None:
    from sglang.srt.disaggregation.encoder import server

    async def fail(part: OutgoingPart) -> None:
        if is_announced:
            part.announce(SHAPE)
        raise server.BadRequestError("this is no picture")

    assert stages_of(monkeypatch, fail) == ("prepare encoder:failed" if is_announced else "prepare:failed")


def test_a_part_that_is_given_up_ends_its_stage(fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from embferry.connectors.sglang.inside import encoder

    async def give_up(part: OutgoingPart) -> None:
        await encoder.give_up(part.part.text)
        raise encoder.not_wanted()

    assert stages_of(monkeypatch, give_up) == "prepare:aborted"
