"""Bounds of the workers by bytes, their work beside the event loop, and their signs of life."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from embferry.engine.grammar import MATCHER_BYTES
from embferry.serve import off_loop
from embferry.serve.byte_budget import ByteBudget
from embferry.serve.encode.service import EncodeService
from embferry.serve.language import process as language_process
from embferry.serve.language.prompting import PromptThreads
from embferry.serve.worker import http as worker_http
from embferry.trust.digests import MESSAGE_DIGEST, LineReader
from tests.serve.blocking import LARGE, Blocking
from tests.serve.digested import digested
from tests.serve.pictures import encoded, noise, png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import DEADLINE, Joined, client, events, generate_body, run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}
OTHER = {"kind": "image", "data": png(80, 80, "blue")}


def test_an_encode_worker_refuses_what_it_could_not_hold(join: MakeJoined) -> None:
    joined = join(encode={"max_held_bytes": 1})

    async def ask() -> None:
        assert (await joined.post_encode(PICTURE, room=1)).status_code == 200  # however large, it is alone
        held = joined.encode.budget.held
        assert held > 16 * joined.encode.manager.layout.token_bytes
        refused = await joined.post_encode(PICTURE, room=2)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "capacity_exhausted"
        assert "encode.max_held_bytes" in refused.json()["error"]["message"]
        assert joined.encode.budget.held == held
        assert joined.encode.abort_room(1)
        while joined.encode.load:
            await asyncio.sleep(0.001)
        assert joined.encode.budget.held == 0
        assert (await joined.post_encode(PICTURE, room=3)).status_code == 200
        joined.encode.abort_room(3)

    run(ask())


@pytest.mark.parametrize("limit", ["max_rooms", "max_held_bytes"])
def test_embeddings_that_nobody_asks_for_make_room_when_they_are_old(join: MakeJoined, limit: str) -> None:
    joined = join(encode={limit: 2 if limit == "max_rooms" else 200_000, "unclaimed_grace": 0.001})

    async def ask() -> None:
        for room in range(20):
            assert (await joined.post_encode(PICTURE, room=room)).status_code == 200
            await asyncio.sleep(0.002)
        assert joined.encode.load < 20
        assert joined.encode.room(0) is None
        answer = await joined.ask("what is there?", PICTURE)  # that of an honest client is not displaced
        assert answer.last["type"] == "end"
        for room in range(20):
            joined.encode.abort_room(room)

    run(ask())


def test_a_caller_with_many_unclaimed_embeddings_makes_room_for_one_with_few(join: MakeJoined) -> None:
    joined = join(encode={"max_rooms": 4})

    async def post(room: int, caller: str) -> int:
        transport = httpx.ASGITransport(app=joined.encode_app, raise_app_exceptions=False, client=(caller, 1))
        body = msgspec.msgpack.encode({"room": room, "request_id": "test", "items": [PICTURE]})
        async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=DEADLINE) as http:
            return (await http.post("/encode", content=body, auth=digested)).status_code

    async def ask() -> None:
        assert [await post(room, "10.0.0.1") for room in range(5)] == [200] * 4 + [503]
        assert [await post(room, "10.0.0.2") for room in range(5, 8)] == [200, 200, 503]
        assert [joined.encode.room(room) is not None for room in range(7)] == [False] * 2 + [True] * 2 + [False] + [
            True
        ] * 2
        assert "displaced" in joined.encode.metrics.exposition().decode()
        for room in range(8):
            joined.encode.abort_room(room)

    run(ask())


def test_pixels_and_embeddings_of_all_items_count(join: MakeJoined) -> None:
    """The bytes of the files fit beside what the first request holds, their pixels do not."""
    joined = join()

    async def ask() -> None:
        assert (await joined.post_encode(PICTURE, room=1)).status_code == 200
        held = joined.encode.budget.held
        joined.encode.budget.limit = held + 4096
        assert 2 * len(OTHER["data"]) < 2048
        refused = await joined.post_encode(OTHER, OTHER, room=2)
        assert refused.json()["error"]["code"] == "capacity_exhausted"
        assert joined.encode.budget.held == held
        joined.encode.abort_room(1)

    run(ask())
    joined.wait(lambda: joined.encode.budget.held == 0)
    assert joined.encode.load == 0


def test_a_language_worker_refuses_what_it_could_not_hold(join: MakeJoined) -> None:
    joined = join(language={"max_held_bytes": 1})
    item = {"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
    unknown = {"room": 1, "endpoint": joined.encode.manager.endpoint, "items": [item]}

    async def ask() -> None:
        waiting = asyncio.create_task(joined.post_generate(generate_body(unknown, "what?")))
        while joined.language.load < 1:
            await asyncio.sleep(0.001)
        assert joined.language.budget.held > 16 * joined.encode.manager.layout.token_bytes
        refused = await joined.post_generate(generate_body({"items": []}, "hello"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "language.max_held_bytes" in refused.json()["error"]["message"]
        joined.language.abort_room(1)
        await waiting

    run(ask())
    joined.wait(lambda: joined.language.budget.held == 0)
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_worker_without_a_request_holds_nothing(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load is read without a lock, so it falls only when the bytes of the request have been given back."""
    joined = join()
    of = {joined.encode.budget: joined.encode, joined.language.budget: joined.language}
    loads: dict[str, float] = {}
    resize = ByteBudget._resize

    def noted(budget: ByteBudget, client: str, old: int, new: int) -> None:
        if old and not new:
            loads[of[budget].role] = of[budget].load
        resize(budget, client, old, new)

    monkeypatch.setattr(ByteBudget, "_resize", noted)
    run(joined.ask("what?", PICTURE))
    joined.wait(lambda: joined.encode.load == 0)
    run(joined.ask("what?"))  # one without an embedding holds its bytes to its end
    assert loads == {"encode": 1, "language": 1}


def test_the_form_of_an_answer_counts_while_its_request_waits(join: MakeJoined) -> None:
    joined = join(language={"max_held_bytes": MATCHER_BYTES})
    item = {"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
    unknown = {"room": 1, "endpoint": joined.encode.manager.endpoint, "items": [item]}
    form = {"regex": "yes|no"}

    async def ask() -> None:
        waiting = asyncio.create_task(joined.post_generate(generate_body(unknown, "what?", constraint=form)))
        while joined.language.load < 1:
            await asyncio.sleep(0.001)
        assert joined.language.budget.held > MATCHER_BYTES
        refused = await joined.post_generate(generate_body({"items": []}, "hello"))
        assert (refused.status_code, "language.max_held_bytes" in refused.text) == (503, True)
        joined.language.abort_room(1)
        await waiting

    run(ask())
    joined.wait(lambda: joined.language.budget.held == 0)


def test_a_worker_redirects_nobody(join: MakeJoined) -> None:
    joined = join()

    async def ask(app: Any) -> list[httpx.Response]:
        async with client(app) as http:
            return [await http.get("/health/"), await http.post("/metrics/")]

    for app in (joined.encode_app, joined.language_app):
        for response in run(ask(app)):
            assert response.status_code == 404
            assert "location" not in response.headers


def test_the_bounds_are_in_the_metrics(join: MakeJoined) -> None:
    joined = join()

    async def read(app: Any) -> list[str]:
        async with client(app) as http:
            return (await http.get("/metrics")).text.splitlines()

    for app in (joined.encode_app, joined.language_app):
        lines = run(read(app))
        assert "embferry_process_held_bytes 0.0" in lines
        assert 'embferry_worker_control_messages_total{outcome="rejected"} 0.0' in lines
        assert 'embferry_worker_control_messages_total{outcome="dropped"} 0.0' in lines
        assert 'embferry_worker_transport_lost{transport="memory"} 0.0' in lines
    lines = run(read(joined.encode_app))
    assert "embferry_encode_parked_requests 0.0" in lines
    assert "embferry_encode_parked_bytes 0.0" in lines
    assert any(line.startswith("embferry_worker_control_connections ") for line in lines)


# Beside the event loop, and signs of life


@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_worker_answers_while_it_parses(join: MakeJoined, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    joined: Joined = join()
    app, path = (joined.encode_app, "/encode") if role == "encode" else (joined.language_app, "/generate")
    blocking = Blocking(worker_http.decoded)
    monkeypatch.setattr(worker_http, "decoded", blocking)

    async def both() -> Any:
        async with client(app) as http:
            asking = asyncio.create_task(http.post(path, content=b"\xc1" + bytes(LARGE)))
            try:
                assert await asyncio.to_thread(blocking.called.wait, DEADLINE)
                assert (await http.get("/health")).status_code == 200
                assert not asking.done()
            finally:
                blocking.release.set()
            return await asking

    assert events(run(both()))[-1]["error"]["code"] == "invalid_request"
    assert off_loop.LARGE_BYTES < LARGE


async def exchange(
    app: Any, path: str, pieces: list[bytes], on_signs: Callable[[], None] = lambda: None
) -> tuple[int, list[bytes]]:
    """Sends a request and returns status and lines of the response.

    After three signs of life, ``on_signs`` is called and all pieces of the request but the first are sent.
    """
    signs, received, status, left = asyncio.Event(), bytearray(), 0, list(pieces)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        if len(left) < len(pieces):
            await signs.wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        received.extend(message.get("body", b""))
        if received.count(b"\n") == 3:
            signs.set()
            on_signs()

    request = digested(httpx.Request("POST", f"http://worker{path}", content=b"".join(pieces)))
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(name.lower(), value) for name, value in request.headers.raw]}
    await app(scope | {"asgi": {"spec_version": "2.3"}}, receive, send)
    return status, LineReader(request.headers[MESSAGE_DIGEST]).feed(bytes(received))


@pytest.mark.parametrize("outcome", ["success", "error"])
def test_a_slow_encode_worker_gives_signs_of_life(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    joined = join()
    monkeypatch.setattr(worker_http, "PING_SECONDS", 0.001)
    blocking = Blocking(EncodeService.prepare)
    monkeypatch.setattr(EncodeService, "prepare", lambda *arguments: blocking(*arguments))
    item = PICTURE if outcome == "success" else {"kind": "image", "data": b"junk"}

    body = msgspec.msgpack.encode({"room": 9, "request_id": "test", "items": [item]})
    status, received = run(exchange(joined.encode_app, "/encode", [body], blocking.release.set))
    assert status == 200
    content = json.loads(received[-1])
    assert not any(received[:-1])
    if outcome == "success":
        assert content["room"] == 9
        joined.encode.abort_room(9)
    else:
        assert (content["error"]["status"], content["error"]["code"]) == (415, "unsupported_media_type")


def test_a_slow_language_worker_gives_signs_of_life(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join()
    monkeypatch.setattr(language_process, "PING_SECONDS", 0.001)
    blocking = Blocking(PromptThreads.build)
    monkeypatch.setattr(PromptThreads, "build", lambda *arguments: blocking(*arguments))

    body = json.dumps(generate_body({"items": []}, "hello")).encode()
    status, received = run(exchange(joined.language_app, "/generate", [body], blocking.release.set))
    lines = [json.loads(line) for line in received]
    assert (status, lines[-1]["type"]) == (200, "end")
    assert lines[0] == {"type": "ping"}


@pytest.mark.parametrize("role", ["encode", "language"])
def test_signs_of_life_come_while_the_request_arrives(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """A slow link is no stalled worker: the second half of the body comes after three signs of life."""
    joined = join()
    monkeypatch.setattr(worker_http, "PING_SECONDS", 0.001)
    monkeypatch.setattr(language_process, "PING_SECONDS", 0.001)
    if role == "encode":
        app, path = joined.encode_app, "/encode"
        body = msgspec.msgpack.encode({"room": 9, "request_id": "test", "items": [PICTURE]})
    else:
        app, path = joined.language_app, "/generate"
        body = json.dumps(generate_body({"items": []}, "hello")).encode()
    status, received = run(exchange(app, path, [body[:20], body[20:]]))
    assert status == 200
    last = json.loads(received[-1])
    assert last["room"] == 9 if role == "encode" else last["type"] == "end"
    joined.encode.abort_room(9)


@pytest.mark.parametrize("room", ["9" * 5000, "-1", "x", "1.5", "%D9%A3"])
def test_a_room_that_there_cannot_be_is_not_found(join: MakeJoined, room: str) -> None:
    """Python refuses to make an integer of more than 4,300 digits."""
    joined = join()

    async def ask(app: Any, method: str, path: str) -> int:
        async with client(app) as http:
            return (await http.request(method, path)).status_code

    for app in (joined.encode_app, joined.language_app):
        assert run(ask(app, "DELETE", f"/rooms/{room}")) == 404
    assert run(ask(joined.encode_app, "GET", f"/embeddings/{room}")) == 404
