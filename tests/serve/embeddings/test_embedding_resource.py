"""An encode worker's embeddings as HTTP resources: bytes, headers, refusals, and downloads during encoding."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from embferry.engine.encoder import Encoder
from embferry.protocol.layout import Field, Layout
from embferry.serve.encode import embedding_resource
from embferry.serve.encode.embedding_resource import layout_field
from embferry.testing.pair import eventually
from embferry.transports.in_memory.transport import InMemoryTransport
from tests.serve.embeddings.conftest import CLIENT_TIMEOUT, OTHER, PICTURE, EncodeWorker
from tests.serve.workers.joined import Answer, Joined, Models, client, events, generate_body, settings_for
from tests.serve.workers.joined import run as ask

pytestmark = pytest.mark.integration


def test_whole_and_partial_downloads(worker: EncodeWorker) -> None:
    room, expected = worker.open(PICTURE), worker.expected(PICTURE)
    whole = worker.http.get(f"/embeddings/{room}")
    assert (whole.status_code, whole.content) == (200, expected)
    tokens, size = int(whole.headers["embferry-tokens"]), int(whole.headers["embferry-token-bytes"])
    assert tokens * size == len(expected)
    assert whole.headers["accept-ranges"] == "bytes"
    etag = whole.headers["etag"]
    for start, stop in [(0, 1), (size, 2 * size), (size + 3, 5 * size - 1), (len(expected) - 1, len(expected))]:
        part = worker.http.get(f"/embeddings/{room}", headers={"Range": f"bytes={start}-{stop - 1}", "If-Range": etag})
        assert (part.status_code, part.content) == (206, expected[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(expected)}"
    assert worker.http.get(f"/embeddings/{room}", headers={"Range": "bytes=-7"}).content == expected[-7:]
    changed = worker.http.get(f"/embeddings/{room}", headers={"Range": "bytes=5-", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, expected)
    assert worker.http.delete(f"/embeddings/{room}").status_code == 204


def test_the_items_of_a_room_follow_each_other(worker: EncodeWorker) -> None:
    room = worker.open(PICTURE, OTHER, PICTURE)
    assert worker.http.get(f"/embeddings/{room}").content == worker.expected(PICTURE, OTHER, PICTURE)
    worker.http.delete(f"/embeddings/{room}")


def test_head_needs_no_encoding(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", failing_encode)
        room = worker.open(PICTURE)
        head = worker.http.head(f"/embeddings/{room}")
        assert (head.status_code, head.content) == (200, b"")
        assert worker.service.room(room) is not None
    whole = worker.http.get(f"/embeddings/{room}")
    assert len(whole.content) == int(head.headers["content-length"])
    described = {name: value for name, value in whole.headers.items() if name not in ("date", "server")}
    assert described == {name: value for name, value in head.headers.items() if name not in ("date", "server")}
    assert worker.http.get(f"/embeddings/{room}", headers={"If-None-Match": head.headers["etag"]}).status_code == 304
    worker.http.delete(f"/embeddings/{room}")


def test_the_layout_header_has_the_offset_of_each_field(worker: EncodeWorker) -> None:
    room = worker.open(OTHER)
    layout = worker.http.head(f"/embeddings/{room}").headers["embferry-layout"]
    assert layout.startswith('"input_embeddings";dtype=float32;width=')
    assert layout == layout_field(worker.service.manager.layout)
    strange = Layout((Field('a"\r\nb', "int32", 2), Field("c", "uint8", 1)))
    assert layout_field(strange) == '"a???b";dtype=int32;width=2;offset=0, "c";dtype=uint8;width=1;offset=8'
    worker.http.delete(f"/embeddings/{room}")


def test_a_digest_is_sent_on_request(worker: EncodeWorker) -> None:
    room, expected = worker.open(OTHER), worker.expected(OTHER)
    wanted = {"Want-Repr-Digest": "sha-256=10"}
    assert "repr-digest" not in worker.http.head(f"/embeddings/{room}", headers=wanted).headers, "not encoded yet"
    assert "repr-digest" not in worker.http.get(f"/embeddings/{room}").headers
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(expected).digest()).decode()}:"
    for _ in range(2):
        whole = worker.http.get(f"/embeddings/{room}", headers=wanted)
        assert (whole.headers["repr-digest"], whole.headers["content-digest"]) == (digest, digest)
    part = worker.http.get(f"/embeddings/{room}", headers={**wanted, "Range": "bytes=3-"})
    assert (part.status_code, part.headers["repr-digest"], part.content) == (206, digest, expected[3:])
    worker.http.delete(f"/embeddings/{room}")


def test_refusals_have_codes_of_the_project(worker: EncodeWorker) -> None:
    room = worker.open(OTHER)
    length = int(worker.http.head(f"/embeddings/{room}").headers["content-length"])
    path = f"/embeddings/{room}"

    def refused(method: str, where: str, headers: dict[str, str], status: int, code: str) -> httpx.Response:
        response = worker.http.request(method, where, headers=headers)
        assert response.status_code == status
        if method != "HEAD":
            assert response.json()["error"]["code"] == code
            assert response.json()["error"]["status"] == status
        return response

    beyond = refused("GET", path, {"Range": f"bytes={length}-"}, 416, "invalid_request")
    assert beyond.headers["content-range"] == f"bytes */{length}"
    assert refused("POST", path, {}, 405, "method_not_allowed").headers["allow"] == "GET, HEAD, DELETE"
    refused("GET", path, {"If-Match": '"other"'}, 412, "invalid_request")
    refused("DELETE", path, {"If-Match": '"other"'}, 412, "invalid_request")
    for unknown in ("1", "0" * 5000, "9" * 30, "x", "-1"):
        for method in ("GET", "HEAD", "DELETE"):
            refused(method, f"/embeddings/{unknown}", {}, 404, "not_found")
    assert worker.http.delete(path).status_code == 204
    eventually(lambda: worker.service.room(room) is None)
    for method in ("GET", "HEAD", "DELETE"):
        refused(method, path, {}, 404, "not_found")


def test_bytes_are_sent_while_the_encoder_runs(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first picture arrives while the second waits in the encoder."""
    resume = threading.Event()
    expected, first = worker.expected(PICTURE, OTHER), len(worker.expected(PICTURE))
    real = Encoder.encode

    def slow(self: Encoder, item: Any) -> Any:
        if worker.service.metrics.items.labels("image")._value.get() >= 1:
            assert resume.wait(CLIENT_TIMEOUT)
        return real(self, item)

    monkeypatch.setattr(Encoder, "encode", slow)
    room = worker.open(PICTURE, OTHER)
    with worker.http.stream("GET", f"/embeddings/{room}") as response:
        got = b""
        for part in response.iter_raw():
            got += part
            if len(got) == first:
                resume.set()
        assert got == expected
    worker.http.delete(f"/embeddings/{room}")


def test_a_download_ends_with_an_error_if_the_encoder_takes_too_long(
    start: Callable[..., EncodeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_resource, "WAIT_SECONDS", 0.1)
    worker, resume = start(), threading.Event()
    monkeypatch.setattr(Encoder, "encode", lambda *_: resume.wait(CLIENT_TIMEOUT) and failing_encode())
    room = worker.open(OTHER)
    response = worker.http.get(f"/embeddings/{room}")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "lease_expired")
    assert response.json()["error"]["retryable"]
    resume.set()
    eventually(lambda: worker.service.room(room) is None)


def test_a_failed_encode_is_an_error(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "encode", failing_encode)
    room = worker.open(OTHER)
    response = worker.http.get(f"/embeddings/{room}")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "transfer_failed")


def test_an_abort_ends_a_running_download(worker: EncodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    resume, real, calls = threading.Event(), Encoder.encode, iter(range(9))

    def slow(self: Encoder, item: Any) -> Any:
        if next(calls):
            resume.wait(CLIENT_TIMEOUT)
        return real(self, item)

    monkeypatch.setattr(Encoder, "encode", slow)
    room = worker.open(PICTURE, OTHER)
    with worker.http.stream("GET", f"/embeddings/{room}") as response:
        parts = response.iter_raw()
        next(parts)
        assert worker.http.delete(f"/embeddings/{room}").status_code == 204
        with pytest.raises(httpx.RemoteProtocolError):
            list(parts)
    resume.set()


def test_a_client_that_does_not_read_is_cut_off_after_a_few_chunks(
    start: Callable[..., EncodeWorker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedding_resource, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(embedding_resource, "CHUNK_BYTES", 4096)
    worker = start()
    worker._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets inherit it
    room = worker.open(*[PICTURE] * 8)
    length = int(worker.http.head(f"/embeddings/{room}").headers["content-length"])
    open_room = worker.service.room(room)
    assert open_room is not None
    worker.service.claim(open_room)
    eventually(lambda: open_room.encoded[1] == open_room.total_tokens)  # so the download waits for the client only
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(CLIENT_TIMEOUT)
        sock.connect(("127.0.0.1", worker.port))
        sock.sendall(f"GET /embeddings/{room} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        eventually(lambda: "ended at byte" in caplog.text)
        got = 0
        while part := sock.recv(1 << 16):
            got += len(part)
    assert 0 < got < length // 2
    worker.http.delete(f"/embeddings/{room}")


def test_a_download_does_not_change_the_transfer(models: Models) -> None:
    """The answer after a download equals that of the undivided model."""

    async def download_and_ask(joined: Joined) -> tuple[bytes, Answer]:
        encoded = (await joined.post_encode(PICTURE, OTHER)).json()
        async with client(joined.encode_app) as http:
            downloaded = await http.get(f"/embeddings/{encoded['room']}")
        response = await joined.post_generate(generate_body(encoded, "what?"))
        return downloaded.content, Answer(response.status_code, events(response))

    with Joined(models, InMemoryTransport, settings_for()) as joined:
        downloaded, answer = ask(download_and_ask(joined))
        assert answer.tokens == joined.reference("what?", PICTURE, OTHER)
    with EncodeWorker(models.encoder) as worker:
        assert downloaded == worker.expected(PICTURE, OTHER)


def test_downloads_do_not_keep_an_unclaimed_room_open(start: Callable[..., EncodeWorker]) -> None:
    worker = start(unclaimed_timeout=0.3)
    room = worker.open(OTHER)
    eventually(lambda: worker.http.get(f"/embeddings/{room}").status_code == 404)


def failing_encode(*_: object) -> Any:
    raise RuntimeError("out of memory")
