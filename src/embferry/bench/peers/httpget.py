"""One HTTP GET on a connection that stays: the standard library's server, its client reading straight into the tensor.

The fastest that HTTP in Python gets: frameworks add copies of the body on both sides."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from ..contract import Bytes, Facts, Job, Link, Receiving, Sending


class HttpGetSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._link = source, link

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
        self._link.tell()  # it is ready: come and get it

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()


class HttpGetReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._tensor = np.empty(job.size, np.uint8)
        self._link, self._timeout_s = link, job.timeout_s

    def connect(self, other: Facts) -> None:
        self._client = http.client.HTTPConnection("127.0.0.1", other["port"], timeout=self._timeout_s)

    def arm(self, number: int, staged: Facts) -> None:
        self._path = f"/embeddings/{number}"

    def receive(self) -> None:
        self._link.wait()
        self._client.request("GET", self._path)
        response = self._client.getresponse()
        view, got = memoryview(self._tensor.data), 0
        while got < len(view) and (count := response.readinto(view[got:])):
            got += count
        if got < len(view) or response.status != 200:
            raise EOFError(f"status {response.status}, {got} of {len(view)} bytes")
        response.close()

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def close(self) -> None:
        self._client.close()
