"""A server that answers a question of ``embferry ask`` as a test has told it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Router:
    """A router.

    Attributes:
        models: the names that it lists.
        answer: the status and the JSON with which it answers a question, or the texts of the chunks of an answer.
        odd: a line that the answer begins with.
        finish: why the answer ends.
        usage: the tokens of the answer; None: they are not counted.
        key: the API key that it asks for; None: none.
        asked: the bodies of the questions.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: list[str] = ["m"]
        self.answer: tuple[int, Any] | list[str] = ["a red ", "circle"]
        self.odd = ""
        self.finish: str | None = "stop"
        self.usage: int | None = None
        self.key: str | None = None
        self.asked: list[dict[str, Any]] = []


@contextmanager
def router() -> Iterator[Router]:
    """Runs a router within the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if told.key is not None and self.headers["authorization"] != f"Bearer {told.key}":
                self._send(401, json.dumps({"error": {"message": "the API key is missing or wrong", "type": "x"}}))
                return
            self._send(200, json.dumps({"data": [{"id": name} for name in told.models]}))

        def do_POST(self) -> None:
            told.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if isinstance(told.answer, tuple):
                self._send(told.answer[0], json.dumps(told.answer[1]))
                return
            chunks: list[Any] = [{"choices": [{"delta": {"content": text}}]} for text in told.answer]
            chunks.append({"choices": [{"delta": {}, "finish_reason": told.finish}]})
            if told.usage is not None:
                chunks.append({"choices": [], "usage": {"completion_tokens": told.usage}})
            self._send(
                200, told.odd + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            )

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Router(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
