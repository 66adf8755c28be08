"""One HTTP GET on a kept connection, with the standard library; the client reads straight into the tensor.

This is the fastest that HTTP in Python gets: frameworks copy the body on both sides.
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..contract import Bytes, Facts, Job, Link, Sending, TensorReceiving


class HttpGetSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 0

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(len(source)))
                self.end_headers()
                self.wfile.write(source.data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="bench-http", daemon=True)
        self._thread.start()

    def address(self) -> Facts:
        return {"port": self._server.server_port}

    def send(self) -> None:
        self.link.tell()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()


class HttpGetReceiving(TensorReceiving):
    def connect(self, other: Facts) -> None:
        self._client = http.client.HTTPConnection("127.0.0.1", other["port"], timeout=self.job.timeout_s)

    def arm(self, number: int, staged: Facts) -> None:
        self._path = f"/embeddings/{number}"

    def receive(self) -> None:
        self.link.wait()
        self._client.request("GET", self._path)
        response = self._client.getresponse()
        if response.status != 200:
            raise ConnectionError(f"status {response.status}")
        self.fill(response.readinto)
        response.close()

    def close(self) -> None:
        self._client.close()
