"""A sender whose responses are scripted, which publishes one write."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from embferry.testing.pair import DEADLINE_S, eventually
from embferry.transports.http.messages import HttpAddress, Publication

ETAG = '"1-feed"'
Scripted = bytes | Callable[[socket.socket], None]


def publication(ranges: list[tuple[int, int]], *, number: int = 1, epoch: int = 1) -> bytes:
    """A response to a poll that lists one write."""
    packed = np.array(ranges, ">u8").tobytes()
    return poll_response([Publication(number, epoch, ETAG, sum(length for _, length in ranges), packed)])


def poll_response(publications: object) -> bytes:
    body = msgspec.msgpack.encode(publications)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def body_response(
    data: bytes, *fields: str, status: str = "200 OK", etag: str | None = ETAG, length: int | None = None
) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data) if length is None else length}", *fields]
    if etag is not None:
        lines.append(f"ETag: {etag}")
    return "\r\n".join([*lines, "", ""]).encode() + data


class ScriptedSender:
    """A context manager. After the scripts, polls wait and fetches get 404. Each response closes its connection.

    Attributes:
        polls: Number of polls so far.
        requests: Method, path and Range of every request except polls.
    """

    def __init__(self, polls: Sequence[Scripted], fetches: Sequence[Scripted] = ()) -> None:
        self._polls, self._fetches = iter(polls), iter(fetches)
        self.polls = 0
        self.requests: list[tuple[str, str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="scripted-sender")]
        port = self._listener.getsockname()[1]
        self.address = msgspec.msgpack.encode(HttpAddress(f"http://127.0.0.1:{port}", bytes(16)))

    def __enter__(self) -> ScriptedSender:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self._listener.close()

    def outcome(self) -> str:
        """Waits for the receiver's report on the write and returns its outcome."""
        eventually(lambda: any(method == "DELETE" for method, _, _ in self.requests))
        path = next(path for method, path, _ in self.requests if method == "DELETE")
        return path.partition("?outcome=")[2]

    @property
    def ranges(self) -> list[str]:
        """Range of every request for the write's bytes; empty for one without."""
        return [requested for method, _, requested in self.requests if method == "GET"]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(sock,), name="scripted-sender"))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        self._open.add(sock)
        with sock, contextlib.suppress(OSError):
            for method, path, requested in received_requests(sock):
                response = self._response(method, path, requested)
                if callable(response):
                    response(sock)
                else:
                    sock.sendall(response)
                if method != "DELETE":
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass
                    break
        self._open.discard(sock)

    def _response(self, method: str, path: str, requested: str) -> Scripted:
        if "?after=" in path:
            assert "&landed=" in path
            self.polls += 1
            response = next(self._polls, None)
            if response is None:
                self._stopping.wait(DEADLINE_S)
            return response or b"HTTP/1.1 204 No Content\r\n\r\n"
        self.requests.append((method, path, requested))
        if method == "DELETE":
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        return next(self._fetches, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def received_requests(sock: socket.socket) -> Iterator[tuple[str, str, str]]:
    """Yields method, path and Range of each request."""
    data = b""
    while part := sock.recv(1 << 16):
        data += part
        while b"\r\n\r\n" in data:
            head, data = data.split(b"\r\n\r\n", 1)
            method, path, _ = head.decode().split("\r\n")[0].split(" ")
            match = re.search(r"\r\nRange: (.*)", head.decode())
            yield method, path, match[1].strip() if match else ""
