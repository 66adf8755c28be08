"""Encoders that answer over HTTP as SGLang's with the plug-in do, without SGLang."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from embferry.connectors.sglang.encoder_side import EncoderSide
from embferry.connectors.sglang.encoders import PATH

from .both_sides import SETTINGS, WIDTH

Answer = tuple[int, dict[str, Any]]


class HttpEncoder:
    """An encoder. A context manager.

    Attributes:
        encoded: The bodies of its encode requests, in order.
        parents: Their ``traceparent``, None for a request without.
        abandoned: The parts that were abandoned, in order.
        answer: Returns the answer to an encode request; may block.
        has_plugin: Whether it says that it has the plug-in.
        describes: Set unless it keeps silent when it is asked what it is.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer] = lambda body: (200, {})) -> None:
        self.encoded: list[dict[str, Any]] = []
        self.parents: list[str | None] = []
        self.abandoned: list[str] = []
        self.answer, self.has_plugin = answer, True
        self.describes = threading.Event()
        self.describes.set()
        self.side = EncoderSide(SETTINGS, {"IMAGE": WIDTH}, "float32")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stands_still(self) -> None:
        """Its process answers no message of the library any more. Its HTTP server does, as the kernel would."""
        self.side.close()

    def close(self) -> None:
        self.describes.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.side.close()

    def __enter__(self) -> HttpEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        encoder = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                encoder.describes.wait()
                if self.path == PATH and encoder.has_plugin:
                    self._send(200, encoder.side.describe())
                else:
                    self._send(404, b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/encode":
                    encoder.encoded.append(body)
                    encoder.parents.append(self.headers["traceparent"])
                    status, answer = encoder.answer(body)
                    self._send(status, json.dumps(answer).encode())
                    return
                assert self.path == f"{PATH}/abandon"
                encoder.abandoned.append(body["part"])
                self._send(200, b"{}")

            def _send(self, status: int, content: bytes) -> None:
                with contextlib.suppress(OSError):  # the dispatcher has hung up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
