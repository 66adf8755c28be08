"""An HTTP server in front of an encoder, which may change what the encoder answers about its embeddings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import msgspec

Params = dict[str, Any]
HOP = {"connection", "content-length", "transfer-encoding", "content-encoding", "host"}
TIMEOUT_S = 60.0


class Gate:
    """Passes requests on to ``upstream``, a base URL. A context manager.

    :param change: is shown the ``ec_transfer_params`` of each answer before the answer goes on, and answers with those
        that are to go on.
    """

    def __init__(self, upstream: str, change: Callable[[Params], Params]) -> None:
        client = self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass_on(b"")

            def do_POST(self) -> None:
                self._pass_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def _pass_on(self, body: bytes) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
                try:
                    answer = client.request(self.command, upstream + self.path, content=body, headers=headers)
                except httpx.HTTPError:
                    self.close_connection = True  # as if the encoder had broken it off
                    return
                content = _changed(answer, change)
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the encoder has a log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True  # they wait for requests that do not come
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="gate")
        self._thread.start()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._client.close()


def _changed(answer: httpx.Response, change: Callable[[Params], Params]) -> bytes:
    if "json" not in answer.headers.get("Content-Type", ""):
        return answer.content
    body = msgspec.json.decode(answer.content)
    if not isinstance(body, dict) or not body.get("ec_transfer_params"):
        return answer.content
    return msgspec.json.encode(body | {"ec_transfer_params": change(body["ec_transfer_params"])})
