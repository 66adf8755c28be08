"""A peer in a process of its own, to be killed or stopped.

``metadata``: as much of a metadata server as the engine needs; prints its port. ``receive``: a receiver; prints its
handle, then waits. ``write HANDLE EPOCH``: a sender that writes to the whole large region again and again, until writes
fail; prints ``begun``, then the kinds of outcomes.
"""

from __future__ import annotations

import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from embferry.memory.buffers import MultimodalDataBuffers, source_pieces
from embferry.testing.pair import LARGE, SMALL, embedding
from embferry.transports.contract import Window, Written
from embferry.transports.leased.mooncake import MooncakeTransport, write_engine

IN_FLIGHT = 16


def receive() -> None:
    buffers = MultimodalDataBuffers(SMALL, shared=True)
    transport = MooncakeTransport()
    handle = transport.register(buffers)
    transport.admit(Window(1, (0, 1)))
    print(handle.hex(), flush=True)
    signal.pause()


def write(handle: bytes, epoch: int) -> None:
    # More in flight at any moment than fits into socket buffers, so that the test finds it in the middle of a write.
    write_engine.SLICE_BYTES, write_engine.MAX_BYTES = LARGE.region_bytes, 4 * LARGE.region_bytes
    woken = threading.Event()
    transport = MooncakeTransport(woken.set)
    transport.connect(handle)
    blocks = tuple(range(LARGE.num_blocks))
    tokens = LARGE.num_blocks * LARGE.block_size
    pieces = source_pieces(LARGE, embedding(LARGE.layout, tokens), 0, tokens, blocks, 0)
    for ticket in range(IN_FLIGHT):
        transport.write(handle, epoch, blocks, pieces, ticket)
    print("begun", flush=True)
    outcomes: set[str] = set()
    left = IN_FLIGHT
    while left:
        assert woken.wait(60)
        woken.clear()
        for event in transport.poll():
            if not isinstance(event, Written):
                continue
            if event.error is None:
                transport.write(handle, epoch, blocks, pieces, event.ticket)
            else:
                outcomes.add("retry" if event.error.retryable else "refused")
                left -= 1
    print(*outcomes, flush=True)
    transport.close()


class Metadata(BaseHTTPRequestHandler):
    values: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self._answer(self.values.get(self.path))

    def do_PUT(self) -> None:
        self.values[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def do_DELETE(self) -> None:
        self._answer(self.values.pop(self.path, None))

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")


def metadata() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if sys.argv[1] == "metadata":
    metadata()
elif sys.argv[1] == "receive":
    receive()
else:
    write(bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
