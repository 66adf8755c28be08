"""A sender that speaks as the test wants: one write, and a script of what is answered to those who fetch it."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from embferry.testing.pair import DEADLINE_S, eventually
from embferry.transports.http.wire import HttpAddress, Publication

ETAG = '"1-feed"'
Answer = bytes | Callable[[socket.socket], None]


def publication(ranges: list[tuple[int, int]], *, number: int = 1, epoch: int = 1) -> bytes:
    """The answer to a poll, in which there is one write."""
    packed = np.array(ranges, ">u8").tobytes()
    return polled([Publication(number, epoch, ETAG, sum(length for _, length in ranges), packed)])


def polled(publications: object) -> bytes:
    body = msgspec.msgpack.encode(publications)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def body(
    data: bytes, *fields: str, status: str = "200 OK", etag: str | None = ETAG, length: int | None = None
) -> bytes:
    said = [f"Content-Length: {len(data) if length is None else length}", *fields]
    if etag is not None:
        said.append(f"ETag: {etag}")
    return "\r\n".join([f"HTTP/1.1 {status}", *said, "", ""]).encode() + data


class Impostor:
    """Use as a context manager. Every answer closes its connection; after the scripts, polls wait and fetches get 404.

    Attributes:
        asked: (method, path, Range) of every request but polls.
    """

    def __init__(self, polls: Sequence[Answer], fetches: Sequence[Answer] = ()) -> None:
        self._polls, self._fetches = iter(polls), iter(fetches)
        self.polls = 0
        self.asked: list[tuple[str, str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="impostor")]
        port = self._listener.getsockname()[1]
        self.address = msgspec.msgpack.encode(HttpAddress(f"http://127.0.0.1:{port}", bytes(16)))

    def __enter__(self) -> Impostor:
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
        """Waits for what is said of the write at last."""
        eventually(lambda: any(method == "DELETE" for method, _, _ in self.asked))
        path = next(path for method, path, _ in self.asked if method == "DELETE")
        return path.partition("?outcome=")[2]

    @property
    def ranges(self) -> list[str]:
        return [asked for method, _, asked in self.asked if method == "GET"]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(sock,), name="impostor"))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        self._open.add(sock)
        with sock, contextlib.suppress(OSError):
            for method, path, asked in requests(sock):
                answer = self._answer(method, path, asked)
                if callable(answer):
                    answer(sock)
                else:
                    sock.sendall(answer)
                if method != "DELETE":
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass
                    break
        self._open.discard(sock)

    def _answer(self, method: str, path: str, asked: str) -> Answer:
        if "?after=" in path:
            assert "&landed=" in path
            self.polls += 1
            answer = next(self._polls, None)
            if answer is None:
                self._stopping.wait(DEADLINE_S)
            return answer or b"HTTP/1.1 204 No Content\r\n\r\n"
        self.asked.append((method, path, asked))
        if method == "DELETE":
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        return next(self._fetches, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def requests(sock: socket.socket) -> Iterator[tuple[str, str, str]]:
    data = b""
    while part := sock.recv(1 << 16):
        data += part
        while b"\r\n\r\n" in data:
            head, data = data.split(b"\r\n\r\n", 1)
            method, path, _ = head.decode().split("\r\n")[0].split(" ")
            found = re.search(r"\r\nRange: (.*)", head.decode())
            yield method, path, found[1].strip() if found else ""
