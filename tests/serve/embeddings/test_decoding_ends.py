"""The decoding of a request's media ends with the request."""

from __future__ import annotations

import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from embferry.serve.media.decoding import media
from embferry.serve.media.decoding.child import Child
from embferry.serve.media.decoding.pool import PROCESSES, DecoderPool
from embferry.testing.pair import eventually
from tests.serve.digested import digested
from tests.serve.embeddings.conftest import EncodeWorker
from tests.serve.workers.joined import DEADLINE, whole

pytestmark = pytest.mark.integration

OF_A_CLIENT = PROCESSES - 1
"""Requests of one client that are decoded at the same time."""


def hanging(monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[DecoderPool, list[Child]]:
    """Has files decoded by processes that never end. Returns the processes as they are started, too."""
    started: list[Child] = []

    def begin() -> Child:
        started.append(Child("tests.serve.broken_decoder"))
        return started[-1]

    pool = DecoderPool(count, begin)
    monkeypatch.setattr(media, "POOL", pool)
    return pool, started


def body_of(room: int) -> bytes:
    items = [{"kind": "image", "data": b"hang"}]
    return msgspec.msgpack.encode({"room": room, "request_id": "test", "items": items})


@pytest.mark.parametrize("how", ["abort", "caller leaves", "shut down"])
def test_decoding_ends_with_its_request(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    pool, started = hanging(monkeypatch, 1)
    request = httpx.Request("POST", f"http://127.0.0.1:{worker.port}/encode", content=body_of(5))
    digested(request)
    fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", worker.port)) as caller:
        caller.sendall(f"POST /encode HTTP/1.1\r\n{fields}\r\n".encode() + body_of(5))
        eventually(lambda: bool(started and started[0].jobs))
        if how == "abort":
            assert worker.http.delete("/rooms/5", auth=digested).status_code == 204
        elif how == "shut down":
            worker.service.close()
        if how != "caller leaves":
            assert started[0]._process.wait(60) == -signal.SIGKILL
    assert started[0]._process.wait(60) == -signal.SIGKILL
    eventually(lambda: worker.service.load == 0)
    pool.close()


@pytest.mark.parametrize("how", ["abort", "shut down"])
def test_callers_hear_why_decoding_has_ended_also_of_what_has_not_begun(
    worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pool, started = hanging(monkeypatch, OF_A_CLIENT)
    rooms = range(5, 6 + OF_A_CLIENT)
    with ThreadPoolExecutor(len(rooms)) as callers:

        def post(room: int) -> httpx.Response:
            return whole(worker.http.post("/encode", content=body_of(room), auth=digested, timeout=DEADLINE))

        decoders = worker.service._decoders
        answers = [callers.submit(post, room) for room in rooms[1:]]
        eventually(lambda: sum(child.jobs for child in started) == OF_A_CLIENT)
        answers.append(callers.submit(post, rooms[0]))
        eventually(lambda: decoders.waiting == 1)
        if how == "shut down":
            worker.service.close()
        else:
            for room in rooms:
                assert worker.http.delete(f"/rooms/{room}", auth=digested).status_code == 204
                assert decoders.waiting == 0, "the first one has left its queue"
        errors = [answer.result(DEADLINE).json()["error"] for answer in answers]
    found = {(error["code"], error["status"], error["retryable"]) for error in errors}
    assert found == {{"abort": ("aborted", 499, False), "shut down": ("peer_gone", 503, True)}[how]}
    eventually(lambda: worker.service.load == 0)
    pool.close()
