"""Requests without an answer: refused, aborted, failed. They leave nothing behind, and the next one succeeds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from typing import Any

import httpx
import pytest

from embferry.engine.encoder import Encoder
from embferry.protocol.errors import CapacityError
from embferry.serve.encode.service import EncodeService
from embferry.serve.language.messages import DECODER
from embferry.serve.language.pipeline import JobPipeline
from embferry.transports.contract import Transport
from tests.serve.pictures import claimed_png, encoded, noise, png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import DEADLINE, Joined, client, events, generate_body, run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}

BAD_MEDIA: dict[str, tuple[dict[str, Any], int, str]] = {
    "not a picture": ({"kind": "image", "data": b"hello"}, 415, "unsupported_media_type"),
    "empty": ({"kind": "image", "data": b""}, 400, "media_empty"),
    "truncated": ({"kind": "image", "data": PICTURE["data"][:-900]}, 400, "image_truncated"),
    "bomb": ({"kind": "image", "data": claimed_png(30_000, 30_000)}, 400, "media_too_many_pixels"),
    "zero size": ({"kind": "image", "data": claimed_png(0, 5)}, 400, "media_zero_size"),
    "frames differ": ({"kind": "video", "frames": [png(16, 16), png(16, 32)], "fps": 1.0}, 400, "video_frame_sizes"),
    "no frames": ({"kind": "video", "frames": []}, 400, "media_empty"),
    "neither data nor frames": ({"kind": "video"}, 400, "invalid_request"),
    "unknown kind": ({"kind": "sound", "data": b"x"}, 400, "invalid_request"),
}


@pytest.mark.parametrize("case", BAD_MEDIA)
def test_bad_media_is_refused_and_the_next_request_succeeds(join: MakeJoined, case: str) -> None:
    item, status, code = BAD_MEDIA[case]
    joined = join()
    response = run(joined.post_encode(PICTURE, item))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert joined.encode.load == 0
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_decoded_pictures_count_while_they_are_cut_into_patches(join: MakeJoined) -> None:
    """A file of some kilobytes may be a picture of hundreds of megabytes."""
    joined = join(encode={"max_held_bytes": 3_000_000})
    large = {"kind": "image", "data": png(1000, 1000)}
    assert len(large["data"]) < 10_000
    with joined.encode.budget.hold(1000):
        response = run(joined.post_encode(large))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "capacity_exhausted")
        assert "encode.max_held_bytes" in response.json()["error"]["message"]
    assert joined.encode.budget.held == 0
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_malformed_or_large_body_is_refused(join: MakeJoined) -> None:
    joined = join(media={"max_total_bytes": 1000})

    async def post(app: Any, path: str, body: bytes) -> Any:
        async with client(app) as http:
            return await http.post(path, content=body)

    for app, path in ((joined.encode_app, "/encode"), (joined.language_app, "/generate")):
        response = run(post(app, path, b"\xff{"))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    response = run(post(joined.encode_app, "/encode", bytes(2 << 20)))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_only_downloads_need_no_digests(join: MakeJoined) -> None:
    joined = join()

    async def ask(app: Any, method: str, path: str) -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, content=b"{}" if method == "POST" else None, auth=None)

    for app in (joined.encode_app, joined.language_app):
        assert run(ask(app, "GET", "/health")).headers["content-digest"]
        refused = run(ask(app, "DELETE", "/rooms/5"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "body_damaged")
    for app, path in ((joined.encode_app, "/encode"), (joined.language_app, "/generate")):
        refused = run(ask(app, "POST", path))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "body_damaged")
    assert run(ask(joined.encode_app, "DELETE", "/embeddings/5")).status_code == 404


def test_a_room_number_in_use_is_refused(join: MakeJoined) -> None:
    joined = join()

    async def twice() -> tuple[int, int]:
        first, second = await joined.post_encode(PICTURE, room=5), await joined.post_encode(PICTURE, room=5)
        return first.status_code, second.status_code

    assert run(twice()) == (200, 409)
    assert joined.encode.abort_room(5)
    joined.encode.abort_room(5)  # idempotent: raises nothing


def test_full_workers_refuse_with_retry_after(join: MakeJoined) -> None:
    joined = join(encode={"max_rooms": 1}, language={"max_concurrent": 1, "max_queued": 1})

    async def fill() -> None:
        assert (await joined.post_encode(PICTURE, room=1)).status_code == 200
        refused = await joined.post_encode(PICTURE, room=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "capacity_exhausted")
        assert refused.headers["retry-after"] == "1"
        # The encode worker does not know these rooms, so they stay open until they are aborted.
        body = generate_body(unknown_room(joined), "what?")
        waiting = [asyncio.create_task(joined.post_generate({**body, "room": room})) for room in (11, 12)]
        while joined.language.load < 2:
            await asyncio.sleep(0.001)
        refused = await joined.post_generate({**body, "room": 13})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "capacity_exhausted")
        for room in (11, 12):
            assert joined.language.abort_room(room)
        for response in await asyncio.gather(*waiting):
            assert events(response)[-1]["error"]["code"] == "aborted"

    run(fill())
    joined.encode.abort_room(1)


def unknown_room(joined: Joined) -> dict[str, Any]:
    """Returns an encode response for a room that the encode worker does not know."""
    item = {"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
    return {"room": 1, "endpoint": joined.encode.manager.endpoint, "items": [item]}


REFUSED_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": (
        {"messages": [{"role": "user", "parts": [{"type": "text", "text": "a " * 20_000}]}]},
        "context_length_exceeded",
    ),
    "reserved": ({"messages": [{"role": "user", "parts": [{"type": "text", "text": "<|im_end|>"}]}]}, "invalid_prompt"),
    "too many new tokens": ({"sampling": {"max_tokens": 5000}}, "invalid_parameter"),
    "temperature": ({"sampling": {"temperature": -1.0}}, "invalid_parameter"),
    "unknown item": (
        {"messages": [{"role": "user", "parts": [{"type": "image", "item": 0}]}]},
        "invalid_request",
    ),
    "no messages": ({"messages": []}, "invalid_request"),
    "items without a room": (
        {"items": [{"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16}]},
        "invalid_request",
    ),
}


@pytest.mark.parametrize("case", REFUSED_PROMPTS)
def test_a_bad_generate_request_is_refused_with_a_status(join: MakeJoined, case: str) -> None:
    change, code = REFUSED_PROMPTS[case]
    joined = join()
    response = run(joined.post_generate({**generate_body({"items": []}, "hello"), **change}))
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert joined.language.load == 0


def test_a_failed_encode_ends_the_request_with_an_error(
    join: MakeJoined, transport: type[Transport], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined = join(transport)
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Encoder, "encode", failing_encode)
        answer = run(joined.ask("what?", PICTURE))
    assert answer.last["type"] == "error"
    assert answer.last["error"]["code"] == "transfer_failed"
    assert answer.last["error"]["status"] == 502
    assert answer.tokens == []
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def failing_encode(self: Encoder, item: object) -> None:
    raise RuntimeError("the vision tower failed")


def test_an_embedding_with_another_digest_is_refused(join: MakeJoined) -> None:
    joined = join()

    async def swapped() -> list[dict[str, Any]]:
        encoded = (await joined.post_encode(PICTURE)).json()
        encoded["items"][0]["digest"] = "ab" * 16
        return events(await joined.post_generate(generate_body(encoded, "what?")))

    received = run(swapped())
    assert received[-1]["error"]["code"] == "embedding_mismatch"
    assert not any(event["type"] == "token" for event in received)


@pytest.mark.parametrize("way", ["client leaves", "room is deleted", "encode side is deleted"])
def test_an_abort_during_the_transfer_returns_the_blocks(
    join: MakeJoined, transport: type[Transport], way: str
) -> None:
    """The encoder waits before the second of two items, so the transfer cannot finish before the abort."""
    joined = join(transport, num_blocks=2, block_size=3)
    encoder = PausingEncoder(joined.models.encoder)
    joined.encode.encoder = encoder
    other = {"kind": "image", "data": png(80, 80, "blue")}

    async def abort() -> list[dict[str, Any]] | None:
        encoded = (await joined.post_encode(PICTURE, other, room=42)).json()
        call = asyncio.create_task(joined.post_generate(generate_body(encoded, "what?")))
        while joined.language.pool()["available"] == 2 or not encoder.waiting.is_set():
            await asyncio.sleep(0.001)
        if way == "client leaves":
            call.cancel()
            await asyncio.wait({call})
            return None
        app = joined.language_app if way == "room is deleted" else joined.encode_app
        async with client(app) as http:
            for _ in range(2):
                assert (await http.delete("/rooms/42")).status_code == 204
        return events(await call)

    try:
        received = run(abort())
    finally:
        encoder.resume.set()
    if received is not None:
        assert received[-1]["error"]["code"] == "aborted"
    joined.wait(lambda: joined.language.load == 0 and joined.encode.load == 0)
    joined.wait(lambda: joined.language.pool()["available"] == 2)
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


class PausingEncoder:
    """An encoder that waits before its second item until ``resume`` is set."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._seen = 0
        self.waiting = threading.Event()
        self.resume = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, item: Any) -> Any:
        self._seen += 1
        if self._seen == 2:
            self.waiting.set()
            assert self.resume.wait(DEADLINE)
        return self._encoder.encode(item)


def test_a_language_worker_that_shuts_down_ends_its_requests(join: MakeJoined) -> None:
    joined = join()

    async def shut() -> list[dict[str, Any]]:
        call = asyncio.create_task(joined.post_generate(generate_body(unknown_room(joined), "what?")))
        while joined.language.load < 1:
            await asyncio.sleep(0.001)
        joined.language.refuse()
        refused = await joined.post_generate(generate_body({"items": []}, "hello"))
        assert refused.status_code == 503
        assert not await asyncio.to_thread(joined.language.wait_idle, 0.01)
        await asyncio.to_thread(joined.language.close)
        return events(await call)

    assert_gone(run(shut()), "worker_ending")


def test_a_language_worker_that_shuts_down_ends_jobs_that_have_not_begun(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join()
    stepping, resume, step = threading.Event(), threading.Event(), JobPipeline.step

    def pausing_step(pipeline: JobPipeline) -> bool:
        stepping.set()
        assert resume.wait(DEADLINE)
        return step(pipeline)

    async def shut() -> list[dict[str, Any]]:
        body = generate_body({"items": []}, "hello")
        first = asyncio.create_task(joined.post_generate(body))
        while not stepping.is_set():
            await asyncio.sleep(0.001)
        queued = asyncio.create_task(joined.post_generate(body))
        while joined.language.load < 2:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(joined.language.close))
        while accepts_jobs(joined):
            await asyncio.sleep(0.001)
        resume.set()
        await closing
        await first
        return events(await queued)

    with monkeypatch.context() as patch:
        patch.setattr(JobPipeline, "step", pausing_step)
        assert_gone(run(shut()), "worker_ending")


def accepts_jobs(joined: Joined) -> bool:
    request = DECODER.decode(json.dumps(generate_body({"items": []}, "hello")))
    with contextlib.suppress(CapacityError):
        joined.language.submit(request, lambda event: None)
        return True
    return False


def test_an_encode_worker_that_shuts_down_ends_its_transfers(join: MakeJoined, transport: type[Transport]) -> None:
    joined = join(transport)
    encoder = PausingEncoder(joined.models.encoder)
    joined.encode.encoder = encoder

    async def shut() -> list[dict[str, Any]]:
        encoded = (await joined.post_encode(PICTURE, {"kind": "image", "data": png(80, 80, "blue")})).json()
        call = asyncio.create_task(joined.post_generate(generate_body(encoded, "what?")))
        while not encoder.waiting.is_set():
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(joined.encode.close))
        received = events(await call)  # does not wait for the encoder
        encoder.resume.set()
        await closing
        return received

    assert_gone(run(shut()))


def assert_gone(received: list[dict[str, Any]], code: str = "peer_gone") -> None:
    error = received[-1]["error"]
    assert (error["code"], error["status"], error["retryable"]) == (code, 503, True)


def test_workers_report_health_readiness_metrics_and_pool(join: MakeJoined) -> None:
    joined = join(num_blocks=2, block_size=3)
    answer = run(joined.ask("what?", PICTURE))
    joined.wait(lambda: joined.encode.load == 0)

    async def read(app: Any, path: str) -> tuple[int, str]:
        async with client(app) as http:
            response = await http.get(path)
            return response.status_code, response.text

    for app in (joined.encode_app, joined.language_app):
        assert run(read(app, "/health"))[0] == 200
        assert json.loads(run(read(app, "/ready"))[1])["ready"] is True
        assert run(read(app, "/nowhere"))[0] == 404
    total = float(answer.last["transfer"]["total_tokens"])
    metrics = run(read(joined.language_app, "/metrics"))[1].splitlines()
    assert f"embferry_language_transfer_tokens_total {total}" in metrics
    assert (
        f'embferry_language_transfers_total{{phase="resumed"}} {float(answer.last["transfer"]["resumed"])}' in metrics
    )
    assert 'embferry_language_pool_blocks{state="free"} 2.0' in metrics
    assert "embferry_language_first_token_seconds_count 1.0" in metrics
    metrics = run(read(joined.encode_app, "/metrics"))[1].splitlines()
    assert f"embferry_encode_transfer_tokens_total {total}" in metrics
    assert 'embferry_encode_cache_lookups_total{outcome="miss"} 1.0' in metrics
    assert 'embferry_encode_rooms_ended_total{outcome="delivered"} 1.0' in metrics
    assert 'embferry_encode_rooms{state="inflight"} 0.0' in metrics
    pool = json.loads(run(read(joined.language_app, "/debug/pool"))[1])
    assert pool == {"num_blocks": 2, "available": 2, "used": 0, "quarantined": 0}


@pytest.mark.parametrize("side", ["encode", "language"])
def test_a_worker_whose_thread_has_stopped_reports_it(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    """Waiting requests end with an error, and ``/health`` and ``/ready`` fail, so that the process can be replaced."""
    broken_class, method = {"encode": (EncodeService, "_next"), "language": (JobPipeline, "step")}[side]
    joined = join()
    service, app = (joined.encode, joined.encode_app) if side == "encode" else (joined.language, joined.language_app)

    async def provoke() -> tuple[int, int]:
        if side == "encode":
            await joined.post_encode(PICTURE, room=9)
        else:
            response = await joined.post_generate(generate_body({"items": []}, "hello"))
            assert events(response)[-1]["error"]["retryable"] is True
        while service.fault is None:
            await asyncio.sleep(0.001)
        async with client(app) as http:
            return (await http.get("/health")).status_code, (await http.get("/ready")).status_code

    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL + 1):
        patch.setattr(broken_class, method, raise_a_bug)
        assert run(provoke()) == (503, 503)
    assert "a bug" in repr(service.fault)
    service.fault = None  # the fixture checks for bugs that the test did not cause
    service.close()
    joined.wait(lambda: service.load == 0)


def raise_a_bug(self: object) -> None:
    raise ZeroDivisionError("a bug")
