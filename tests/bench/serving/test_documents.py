"""Documents of servers that are measured end in bounded time and memory, also from a server that never stops."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from embferry.bench.serving import counters, documents
from embferry.bench.serving.client import Endpoint
from embferry.bench.serving.endpoint import first_model, server_version

pytestmark = pytest.mark.integration

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
Sends = Callable[[socket.socket, threading.Event], None]


def endless_body(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(HEAD + b"\r\n")
    while not ended.is_set():
        client.sendall(b"x" * (1 << 16))


def slow_body(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(HEAD + b"\r\n")
    while not ended.wait(0.01):
        client.sendall(b"#\n")


def slow_head(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(HEAD)
    while not ended.wait(0.01):
        client.sendall(b"X: y\r\n")


def silence(client: socket.socket, ended: threading.Event) -> None:
    ended.wait()


def itself(client: socket.socket, ended: threading.Event) -> None:
    """Redirects to itself."""
    client.sendall(b"HTTP/1.1 302 Found\r\nLocation: /models\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def nowhere(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n")


def nonsense(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"\xff\x00 nonsense\r\n\r\n")


SERVERS: list[Sends] = [endless_body, slow_body, slow_head, silence, itself, nowhere, nonsense]


@contextmanager
def serving(sends: Sends) -> Iterator[str]:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(client: socket.socket) -> None:
            with client, suppress(OSError):
                client.recv(1 << 16)
                sends(client, ended)

        def accept() -> None:
            while not ended.is_set():
                client, _ = server.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            ended.set()
            socket.create_connection((host, port)).close()  # wakes accept
            thread.join(30)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sends", SERVERS)
def test_a_server_that_sends_no_document_is_an_error_in_time(sends: Sends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    with serving(sends) as url, pytest.raises(OSError, match=r"."):
        documents.read(f"{url}/models", 0.5)


@pytest.mark.timeout(60)
def test_the_callers_take_it_for_no_answer() -> None:
    with serving(nonsense) as url:
        assert counters.read([f"{url}/metrics"]) == [None]
        assert server_version(url) == "does not tell its version"
        with pytest.raises(ValueError, match="lists no model"):
            first_model(Endpoint(url, ""))


def test_an_address_that_is_none_is_an_error() -> None:
    for url in ("http://", "http://[", "ftp://h/"):
        with pytest.raises(OSError, match=r"."):
            documents.read(url, 5)
