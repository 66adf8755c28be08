"""Requests that do not come to an answer: refused, aborted, failed. Nothing of them stays; the next one succeeds."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from embferry.engine.encoder import Encoder
from embferry.serve.encode.service import EncodeService
from embferry.serve.language.engine import Engine
from embferry.transports.contract import Transport
from tests.serve.pictures import claimed_png, encoded, gif, noise, png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import Joined, client, events, generate_body, run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}

BAD_MEDIA: dict[str, tuple[dict[str, Any], int, str]] = {
    "not a picture": ({"kind": "image", "data": b"hello"}, 415, "unsupported_media_type"),
    "empty": ({"kind": "image", "data": b""}, 400, "media_empty"),
    "truncated": ({"kind": "image", "data": PICTURE["data"][:-900]}, 400, "image_truncated"),
    "bomb": ({"kind": "image", "data": claimed_png(30_000, 30_000)}, 400, "media_too_many_pixels"),
    "zero size": ({"kind": "image", "data": claimed_png(0, 5)}, 400, "media_zero_size"),
    "animated": ({"kind": "image", "data": gif(3)}, 400, "image_animated"),
    "frames differ": ({"kind": "video", "frames": [png(16, 16), png(16, 32)], "fps": 1.0}, 400, "video_frame_sizes"),
    "no frames": ({"kind": "video", "frames": []}, 400, "media_empty"),
    "neither data nor frames": ({"kind": "video"}, 400, "invalid_request"),
    "unknown kind": ({"kind": "sound", "data": b"x"}, 400, "invalid_request"),
}


@pytest.mark.parametrize("case", BAD_MEDIA)
def test_bad_media_is_refused_at_once_and_harms_nobody(join: MakeJoined, case: str) -> None:
    item, status, code = BAD_MEDIA[case]
    joined = join()
    response = run(joined.post_encode(PICTURE, item))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert joined.encode.load == 0
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_body_that_is_none(join: MakeJoined) -> None:
    joined = join(media={"max_total_bytes": 1000})

    async def post(app: Any, path: str, body: bytes) -> Any:
        async with client(app) as http:
            return await http.post(path, content=body)

    for app, path in ((joined.encode_app, "/encode"), (joined.language_app, "/generate")):
        response = run(post(app, path, b"\xff{"))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    response = run(post(joined.encode_app, "/encode", bytes(2 << 20)))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_room_is_used_once(join: MakeJoined) -> None:
    joined = join()

    async def twice() -> tuple[int, int]:
        first, second = await joined.post_encode(PICTURE, room=5), await joined.post_encode(PICTURE, room=5)
        return first.status_code, second.status_code

    assert run(twice()) == (200, 409)
    assert joined.encode.abort_room(5)
    assert joined.encode.abort_room(5) in (True, False)  # idempotent: no error


def test_full_workers_say_when_to_come_again(join: MakeJoined) -> None:
    joined = join(encode={"max_rooms": 1}, language={"max_concurrent": 1, "max_queued": 1})

    async def fill() -> None:
        assert (await joined.post_encode(PICTURE, room=1)).status_code == 200
        refused = await joined.post_encode(PICTURE, room=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "capacity_exhausted")
        assert refused.headers["retry-after"] == "1"
        # Nobody will ever answer for these rooms: they stay until they are aborted.
        body = generate_body(unanswered(joined), "what?")
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


def unanswered(joined: Joined) -> dict[str, Any]:
    """An encode worker's answer for a room it does not know."""
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
    "item that is not there": (
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
def test_a_bad_request_to_generate_is_refused_before_the_answer_begins(join: MakeJoined, case: str) -> None:
    change, code = REFUSED_PROMPTS[case]
    joined = join()
    response = run(joined.post_generate({**generate_body({"items": []}, "hello"), **change}))
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert joined.language.load == 0


def test_a_failed_encode_is_an_error_and_never_an_answer(
    join: MakeJoined, transport: type[Transport], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined = join(transport)
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Encoder, "encode", broken)
        answer = run(joined.ask("what?", PICTURE))
    assert answer.last["type"] == "error"
    assert answer.last["error"]["code"] == "transfer_failed"
    assert answer.last["error"]["status"] == 502
    assert answer.tokens == []
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def broken(self: Encoder, item: object) -> None:
    raise RuntimeError("the tower has fallen")


def test_an_embedding_of_something_else_is_refused(join: MakeJoined) -> None:
    joined = join()

    async def swapped() -> list[dict[str, Any]]:
        told = (await joined.post_encode(PICTURE)).json()
        told["items"][0]["digest"] = "ab" * 16
        return events(await joined.post_generate(generate_body(told, "what?")))

    said = run(swapped())
    assert said[-1]["error"]["code"] == "embedding_mismatch"
    assert not any(event["type"] == "token" for event in said)


@pytest.mark.parametrize("way", ["client leaves", "room is deleted", "encode side is deleted"])
def test_an_abort_in_the_middle_gives_the_blocks_back(join: MakeJoined, transport: type[Transport], way: str) -> None:
    """The encoder stands still before the second of two items: the transfer is under way as long as the test wants."""
    joined = join(transport, num_blocks=2, block_size=3)
    gate = Gate(joined.models.encoder)
    joined.encode.encoder = gate
    other = {"kind": "image", "data": png(80, 80, "blue")}

    async def abort() -> list[dict[str, Any]] | None:
        told = (await joined.post_encode(PICTURE, other, room=42)).json()
        call = asyncio.create_task(joined.post_generate(generate_body(told, "what?")))
        while joined.language.pool()["available"] == 2 or not gate.waiting.is_set():
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
        said = run(abort())
    finally:
        gate.open.set()
    if said is not None:
        assert said[-1]["error"]["code"] == "aborted"
    joined.wait(lambda: joined.language.load == 0 and joined.encode.load == 0)
    joined.wait(lambda: joined.language.pool()["available"] == 2)
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


class Gate:
    """An encoder that waits before its second item until it is opened."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._seen = 0
        self.waiting = threading.Event()
        self.open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, item: Any) -> Any:
        self._seen += 1
        if self._seen == 2:
            self.waiting.set()
            assert self.open.wait(20)
        return self._encoder.encode(item)


def test_a_worker_that_shuts_down_ends_what_it_has(join: MakeJoined) -> None:
    joined = join()

    async def shut() -> list[dict[str, Any]]:
        call = asyncio.create_task(joined.post_generate(generate_body(unanswered(joined), "what?")))
        while joined.language.load < 1:
            await asyncio.sleep(0.001)
        joined.language.refuse()
        refused = await joined.post_generate(generate_body({"items": []}, "hello"))
        assert refused.status_code == 503
        assert not await asyncio.to_thread(joined.language.wait_idle, 0.01)
        await asyncio.to_thread(joined.language.close)
        return events(await call)

    assert_gone(run(shut()))


def test_an_encode_worker_that_shuts_down_ends_its_transfers(join: MakeJoined, transport: type[Transport]) -> None:
    joined = join(transport)
    gate = Gate(joined.models.encoder)
    joined.encode.encoder = gate

    async def shut() -> list[dict[str, Any]]:
        told = (await joined.post_encode(PICTURE, {"kind": "image", "data": png(80, 80, "blue")})).json()
        call = asyncio.create_task(joined.post_generate(generate_body(told, "what?")))
        while not gate.waiting.is_set():
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(joined.encode.close))
        said = events(await call)  # it does not wait for the encoder
        gate.open.set()
        await closing
        return said

    assert_gone(run(shut()))


def assert_gone(said: list[dict[str, Any]]) -> None:
    error = said[-1]["error"]
    assert (error["code"], error["status"], error["retryable"]) == ("peer_gone", 503, True)


def test_health_ready_metrics_and_pool(join: MakeJoined) -> None:
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
    said = run(read(joined.language_app, "/metrics"))[1].splitlines()
    assert f"embferry_transfer_tokens_total {total}" in said
    assert f'embferry_transfers_total{{phase="resumed"}} {float(answer.last["transfer"]["resumed"])}' in said
    assert 'embferry_pool_blocks{state="free"} 2.0' in said
    assert "embferry_ttft_seconds_count 1.0" in said
    said = run(read(joined.encode_app, "/metrics"))[1].splitlines()
    assert f"embferry_transfer_tokens_total {total}" in said
    assert 'embferry_cache_lookups_total{outcome="miss"} 1.0' in said
    assert 'embferry_rooms_total{outcome="delivered"} 1.0' in said
    assert 'embferry_rooms_by_state{state="inflight"} 0.0' in said
    pool = json.loads(run(read(joined.language_app, "/debug/pool"))[1])
    assert pool == {"num_blocks": 2, "available": 2, "used": 0, "quarantined": 0}


@pytest.mark.parametrize("side", ["encode", "language"])
def test_a_worker_whose_thread_has_stopped_says_so(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    """A bug is not hidden: whoever waits is told, ``/health`` and ``/ready`` fail, and the process can be replaced."""
    broken_part = {"encode": EncodeService, "language": Engine}[side]
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
        patch.setattr(broken_part, "_next" if side == "encode" else "step", broken_thread)
        assert run(provoke()) == (503, 503)
    assert "a bug" in repr(service.fault)
    service.fault = None  # the fixture's own check is for bugs nobody asked for
    service.close()
    joined.wait(lambda: service.load == 0)


def broken_thread(self: object) -> None:
    raise ZeroDivisionError("a bug")
