"""The decoding of a request's media ends with the request."""

from __future__ import annotations

import signal
import socket

import httpx
import msgspec
import pytest

from embferry.serve.media.decoding import media
from embferry.serve.media.decoding.child import Child
from embferry.serve.media.decoding.pool import DecoderPool
from embferry.testing.pair import eventually
from tests.serve.digested import digested
from tests.serve.embeddings.conftest import EncodeWorker

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("how", ["abort", "caller leaves", "shut down"])
def test_decoding_ends_with_its_request(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    started: list[Child] = []

    def begin() -> Child:
        started.append(Child("tests.serve.broken_decoder"))
        return started[-1]

    pool = DecoderPool(1, begin)
    monkeypatch.setattr(media, "POOL", pool)
    body = msgspec.msgpack.encode({"room": 5, "request_id": "test", "items": [{"kind": "image", "data": b"hang"}]})
    request = httpx.Request("POST", f"http://127.0.0.1:{worker.port}/encode", content=body)
    digested(request)
    fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", worker.port)) as caller:
        caller.sendall(f"POST /encode HTTP/1.1\r\n{fields}\r\n".encode() + body)
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
