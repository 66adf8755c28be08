"""A stranger to an HTTP server: sends bytes as they are, and a relay that changes what honest ends send each other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from tests.plain_server import SECONDS, PlainServer

Change = Callable[[bytes], bytes]


def send(address: tuple[str, int], data: bytes, *, shuts: bool = True) -> bytes:
    """Sends bytes on a new connection. Returns everything that the server sends back.

    Args:
        address: The server's.
        data: The bytes.
        shuts: Whether the server sees the end of them before it answers.
    """
    with socket.create_connection(address, timeout=SECONDS) as connection:
        connection.sendall(data)
        if shuts:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received


def request(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: h", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class Relay(PlainServer):
    """Passes one request a connection on, and its answer back; each as a whole, so that either can be changed.

    Attributes:
        requests: What clients have sent, before the change.
        answers: What the server has sent, before the change.
        on_request, on_answer: Applied to each.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self.requests: list[bytes] = []
        self.answers: list[bytes] = []
        self.on_request: Change = lambda data: data
        self.on_answer: Change = lambda data: data
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            asked = _one_request(client)
            if not asked:
                return
            self.requests.append(asked)
            head, end, body = self.on_request(asked).partition(b"\r\n\r\n")
            answer = send(self._upstream, head + b"\r\nConnection: close" + end + body, shuts=False)
            self.answers.append(answer)
            client.sendall(self.on_answer(answer))


def _one_request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < sum(lengths):
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body
