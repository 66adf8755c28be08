"""A router as far as a consumer sees it: it answers two kinds of questions, and remembers them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
Asked = tuple[str, str, dict[str, Any]]
"""Kind (``replacements`` or ``failures``), token, body."""


class StubRouter:
    """:param replace: answers (status, JSON) to a token and what was said; by default there is nobody.
    :param pause: before each answer, seconds.
    """

    def __init__(
        self, replace: Callable[[str, dict[str, Any]], Answer] | None = None, *, pause: float = 0, location: str = ""
    ) -> None:
        self.replace = replace or (lambda token, said: (503, {"error": {"message": "no other encoder"}}))
        self.asked: list[Asked] = []
        self.times: list[float] = []
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                _, _, kind, token = self.path.split("/")
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                router.asked.append((kind, token, said))
                router.times.append(time.monotonic())
                router.ended.wait(pause)
                status, body = router.replace(token, said) if kind == "replacements" else (204, None)
                data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def of(self, kind: str) -> list[Asked]:
        return [asked for asked in self.asked if asked[0] == kind]

    def __enter__(self) -> StubRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
