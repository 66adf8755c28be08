"""A small web site, and fetches of its files."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from tests.serve import pictures

PNG = pictures.png()


def fetch(url: str, seen: list[int] | None = None, **limits: Any) -> bytes:
    """Fetches a URL; ``seen`` gets the numbers of bytes that it takes in memory."""

    async def run() -> bytes:
        fetcher = Fetcher(MediaSettings(**limits))
        try:
            return await fetcher.fetch(url, seen.append if seen is not None else lambda nbytes: None)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(url: str, seen: list[int] | None = None, **limits: Any) -> str:
    with pytest.raises(ServeError) as caught:
        fetch(url, seen, **limits)
    assert 400 <= caught.value.http_status < 500
    return caught.value.code


class Site(http.server.BaseHTTPRequestHandler):
    """A small web site. ``seen`` holds the requests it received: (path, Host header)."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    release: ClassVar[threading.Event]
    redirects: ClassVar[dict[str, str]] = {}
    encoded: ClassVar[tuple[str, bytes]] = ("", b"")
    cookies: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if target := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target.encode().decode("latin-1"))  # in UTF-8
            self.end_headers()
        elif self.path == "/picture":
            self._send(PNG, {"Content-Type": "text/nonsense"})
        elif self.path == "/chunks":
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.wfile.write(head + b"1\r\na\r\n" * 100_000)
        elif self.path == "/cookie":
            self.cookies.append(self.headers["Cookie"])
            self._send(PNG, {"Set-Cookie": "a=b; Path=/", "Content-Length": str(len(PNG))})
        elif self.path == "/encoded":
            encoding, body = self.encoded
            self._send(body, {"Content-Encoding": encoding, "Content-Length": str(len(body))})
        elif self.path == "/huge":
            self._send(b"", {"Content-Length": "999999999"})
        elif self.path == "/endless":
            self._send(bytes(300_000), {})
        elif self.path == "/short":
            self._send(PNG[:20], {"Content-Length": "500"})
        elif self.path == "/silent":
            self.release.wait(100)
        elif self.path == "/drip":
            self._send(b"", {"Content-Length": "500"})
            while not self.release.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()
        else:
            self.send_error(404)

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Ignores the clients that disconnect on purpose."""


@contextmanager
def running_site() -> Iterator[str]:
    """Runs the web site and returns its ``host:port``."""
    Site.seen, Site.redirects, Site.release, Site.cookies = [], {}, threading.Event(), []
    with _Server(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        Site.release.set()
        server.shutdown()
        thread.join(10)
