"""An HTTP server on the loopback address that counts what reaches it."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TREASURE = b"treasure"
"""The body of its answers."""


class Canary:
    """A context manager. ``/to?url=…`` redirects; anything else is answered with a text that is no picture.

    Attributes:
        port: Where it listens.
        asked: Requests so far.
    """

    def __init__(self) -> None:
        canary, self.asked = self, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.asked += 1
                target = parse_qs(urlsplit(self.path).query).get("url")
                self.send_response(302 if target else 200)
                if target:
                    self.send_header("Location", target[0].encode().decode("latin-1"))
                body = b"" if target else TREASURE
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
