"""A chat endpoint on a real socket, whose answers the test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Request"], None]


class Request:
    """One request, and ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], ended: threading.Event) -> None:
        self.body, self.ended = body, ended
        self._handler = handler

    @property
    def pictures(self) -> int:
        return sum(part["type"] == "image_url" for part in self.body["messages"][0]["content"])

    def open(self, status: int = 200, kind: str = "text/event-stream") -> None:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Connection", "close")
        self._handler.end_headers()

    def event(self, data: dict[str, Any] | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        self._handler.wfile.write(f"data: {text}\n\n".encode())
        self._handler.wfile.flush()

    def refuse(self, status: int, body: str) -> None:
        self.open(status, "application/json")
        self._handler.wfile.write(body.encode())

    def answer(self, tokens: list[int], text: str = "x") -> None:
        """Sends a whole answer, as vLLM does."""
        self.open()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for token in tokens:
            self.event({"choices": [{"index": 0, "delta": {"content": text}, "token_ids": [token]}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": len(tokens)}})
        self.event("[DONE]")

    def answer_of_sglang(self, tokens: list[int]) -> None:
        """Sends a whole answer, as SGLang does: the ids of all tokens in one event."""
        self.open()
        for _ in tokens:
            self.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        self.event({"choices": [], "sglext": {"output_ids": [tokens]}})
        self.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": len(tokens)}})
        self.event("[DONE]")

    def hang(self) -> None:
        """Blocks until the server is ended."""
        self.ended.wait(100)


@contextmanager
def serving(answer: Answer, documents: dict[str, str] | None = None, port: int = 0) -> Iterator[str]:
    """Yields the endpoint's URL. ``documents`` are the answers to GET, by path."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = (documents or {}).get(self.path)
            self.send_response(200 if text is not None else 404)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write((text or "").encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                answer(Request(self, body, ended))
            except (BrokenPipeError, ConnectionResetError):
                return  # the client gave up

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
