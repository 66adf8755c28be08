"""A router as far as a consumer sees it: it takes two kinds of calls, and records them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from embferry.trust.digests import (
    CONTENT_DIGEST,
    MESSAGE_DIGEST,
    answer_digest,
    check_content,
    content_digest,
    request_digest,
)

Answer = tuple[int, Any]
"""Status, and JSON or bytes."""
Call = tuple[str, str, dict[str, Any]]
"""Kind (``failovers`` or ``failures``), token, body."""


class StubRouter:
    """An HTTP server on the loopback.

    Attributes:
        failover: Returns the answer to a failover, given the token and the body. By default there is no other producer.
        calls: All calls so far, in order.
    """

    def __init__(
        self, failover: Callable[[str, dict[str, Any]], Answer] | None = None, *, pause: float = 0, location: str = ""
    ) -> None:
        """Waits ``pause`` seconds before each answer, and answers with ``location`` as a header if there is one."""
        self.failover = failover or (lambda token, body: (503, {"error": {"message": "no other encoder"}}))
        self.calls: list[Call] = []
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                _, _, kind, token = self.path.split("/")
                received = self.rfile.read(int(self.headers["Content-Length"]))
                check_content(self.headers[CONTENT_DIGEST], received)
                length, content = self.headers["Content-Length"], self.headers[CONTENT_DIGEST]
                expected = request_digest("POST", self.path, length, content)
                assert self.headers[MESSAGE_DIGEST] == expected
                body = json.loads(received)
                router.calls.append((kind, token, body))
                router.closing.wait(pause)
                status, answer = router.failover(token, body) if kind == "failovers" else (204, None)
                data = b"" if answer is None else answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", str(len(data)))
                self.send_header(CONTENT_DIGEST, content_digest(data))
                self.send_header(MESSAGE_DIGEST, answer_digest(expected, status, content_digest(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def failovers(self) -> list[tuple[str, dict[str, Any]]]:
        """Token and body of each failover."""
        return [(token, body) for kind, token, body in self.calls if kind == "failovers"]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> StubRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
