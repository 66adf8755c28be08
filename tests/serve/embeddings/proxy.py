"""A small HTTP proxy in a process of its own: a forward proxy, or a reverse proxy under a path.

``python -m tests.serve.embeddings.proxy [PORT]`` prints its port. With PORT it is a reverse proxy for that port, and
removes the path ``/some/where``. It sends HTTP/1.0 to its upstream, one connection per request, as nginx does by
default.
"""

from __future__ import annotations

import http.client
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PREFIX = "/some/where"
UPSTREAM = int(sys.argv[1]) if len(sys.argv) > 1 else None


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        url = urlsplit(self.path)
        if UPSTREAM is None:
            host, port, path = url.hostname, url.port, url.path
        else:
            assert url.path.startswith(PREFIX), url.path
            host, port, path = "127.0.0.1", UPSTREAM, url.path.removeprefix(PREFIX)
        upstream = http.client.HTTPConnection(host or "", port or 80, timeout=60)
        upstream._http_vsn, upstream._http_vsn_str = 10, "HTTP/1.0"
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "host")}
        try:
            upstream.request(self.command, f"{path}?{url.query}" if url.query else path, headers=kept)
            answer = upstream.getresponse()
        except OSError:
            self.send_error(502)
            return
        self.send_response(answer.status)
        self.send_header("Via", "1.0 test")
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        while part := answer.read(1 << 18):
            self.wfile.write(part)
        upstream.close()

    do_GET = do_HEAD = do_DELETE = pass_on  # noqa: N815  (http.server asks for these names)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client has left


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Proxy) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
