"""The origin's two ends after its description, in plain frames and plain arrays, without any code of ours.

The ``write`` of an engine returns when the bytes are in place.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np
import zmq

TIMEOUT_MS = 20_000
HIDDEN, DEEPSTACK = 64, 128
"""Elements, bfloat16, of a token's embedding and deepstack embedding."""
BLOCK, BLOCKS = 8, 12
"""Tokens a block, and number of blocks."""
FAILED, TRANSFERRING, SUCCESS = 0, 3, 4

TOKEN_BYTES = {
    "input_embeddings": 2 * HIDDEN,
    "fill_ids": 4,
    "mrope_positions": 12,
    "deepstack_embeddings": 2 * DEEPSTACK,
}
AUX_AT = 3  # index of aux_datas among the buffers

Fields = dict[str, Any]


def embedding(tokens: int, seed: int = 1) -> Fields:
    """Returns random bytes, uint8 [tokens, bytes a token] for each field."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (tokens, size), np.uint8) for name, size in TOKEN_BYTES.items()}


class PeerEngine(Protocol):
    session_id: str

    def register(self, address: int, length: int) -> None: ...

    def write(self, session: str, source: int, target: int, length: int) -> bool: ...


class Buffers:
    """The origin's buffers, a row for each block; mrope_positions of n tokens are [3, n] in their row."""

    def __init__(self, token_bytes: dict[str, int] = TOKEN_BYTES) -> None:
        self.token_bytes = token_bytes
        self.rows: Fields = {name: np.zeros((BLOCKS, size * BLOCK), np.uint8) for name, size in token_bytes.items()}
        self.aux = np.zeros((BLOCKS, 16), np.int32)

    @property
    def all(self) -> list[Any]:
        fields = list(self.rows.values())
        return [*fields[:AUX_AT], self.aux, *fields[AUX_AT:]]

    def put(self, block: int, tokens: Fields) -> None:
        for name, array in tokens.items():
            row = array
            if name == "mrope_positions":
                row = np.ascontiguousarray(np.ascontiguousarray(array).view(np.int32).T).view(np.uint8)
            self.rows[name][block, : array.size] = row.reshape(-1)

    def get(self, block: int, count: int) -> Fields:
        found = {}
        for name, size in self.token_bytes.items():
            row = self.rows[name][block, : count * size].copy()
            if name == "mrope_positions":
                row = np.ascontiguousarray(row.view(np.int32).reshape(3, count).T).view(np.uint8)
            found[name] = row.reshape(count, size)
        return found


class Socket:
    """A PULL socket, and PUSH sockets to others."""

    def __init__(self, port: int = 0) -> None:
        self.context = zmq.Context()
        self.pull = self.context.socket(zmq.PULL)
        self.pull.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        self.pull.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.port = int(self.pull.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.pushes: dict[tuple[str, int], Any] = {}

    def push(self, host: str, port: int, frames: list[bytes]) -> None:
        if (host, port) not in self.pushes:
            self.pushes[host, port] = self.context.socket(zmq.PUSH)
            self.pushes[host, port].connect(f"tcp://{host}:{port}")
        self.pushes[host, port].send_multipart(frames)

    def close(self) -> None:
        self.context.destroy(linger=0)


class OriginReceiver(Socket):
    """A language side that talks to one encode rank."""

    def __init__(
        self,
        engine: PeerEngine,
        host: str,
        port: int,
        *,
        own_port: int = 0,
        token_bytes: dict[str, int] = TOKEN_BYTES,
    ) -> None:
        super().__init__(own_port)
        self.engine, self.to = engine, (host, port)
        self.buffers = Buffers(token_bytes)
        for array in self.buffers.all:
            engine.register(array.ctypes.data, array.nbytes)

    def say(self, *frames: bytes) -> None:
        self.push(*self.to, list(frames))

    def head(self, room: int | str) -> list[bytes]:
        return [str(room).encode(), b"127.0.0.1", str(self.port).encode(), self.engine.session_id.encode()]

    def register(self) -> None:
        self.say(*self.head("None"), struct.pack("5Q", *(array.ctypes.data for array in self.buffers.all)))

    def init(self, room: int, blocks: list[int], ranks: int = 1) -> None:
        self.say(*self.head(room), text(*blocks), text(ranks), text(len(blocks) * BLOCK))

    def resume(self, room: int, blocks: list[int], sent: int, ranks: int = 1) -> None:
        self.say(*self.head(room), text(*blocks), text(ranks), text(sent), text(len(blocks) * BLOCK))

    def status(self) -> list[bytes]:
        """Returns the next status. Like the origin's receivers it unpacks exactly two frames."""
        room, status = self.pull.recv_multipart()
        return [room, status]

    def take(self, blocks: list[int], tokens: int) -> Fields:
        parts = [self.buffers.get(block, min(BLOCK, tokens - i * BLOCK)) for i, block in enumerate(blocks)
                 if i * BLOCK < tokens]  # fmt: skip
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class OriginSender(Socket):
    """An encode rank with one embedding, in blocks of its own."""

    def __init__(self, engine: PeerEngine, port: int = 0, *, token_bytes: dict[str, int] = TOKEN_BYTES) -> None:
        super().__init__(port)
        self.engine = engine
        self.buffers = Buffers(token_bytes)
        for array in self.buffers.all:
            engine.register(array.ctypes.data, array.nbytes)
        self.pointers: dict[str, tuple[int, ...]] = {}
        self.total = 0

    def encode(self, rows: Fields, delta: int = -7) -> None:
        self.total = len(rows["fill_ids"])
        for block, start in enumerate(range(0, self.total, BLOCK)):
            self.buffers.put(block, {name: array[start : start + BLOCK] for name, array in rows.items()})
        self.buffers.aux[0, :2] = self.total, delta

    def hear(self) -> list[bytes]:
        """Returns the next request, and remembers the registrations before it."""
        while True:
            frames = self.pull.recv_multipart()
            if frames[0] != b"None":
                return frames
            assert len(frames) == 5
            self.pointers[frames[3].decode()] = struct.unpack(f"{len(frames[4]) // 8}Q", frames[4])

    def answer_with(self, frames: list[bytes], rows: Fields, delta: int) -> int:
        """Does what :meth:`answer` does with an embedding longer than the buffers, whose requested part is ``rows``."""
        total = self.total
        for block, start in enumerate(range(0, len(rows["fill_ids"]), BLOCK)):
            self.buffers.put(block, {name: array[start : start + BLOCK] for name, array in rows.items()})
        self.buffers.aux[0, :2] = total, delta
        self.write(frames, from_start=True)
        status = SUCCESS if self.sent(frames) + self.allocated(frames) >= total else TRANSFERRING
        self.report(frames, status)
        return status

    def answer(self, frames: list[bytes], *, rank: int | None = None) -> int:
        """Writes the requested tokens and reports the status, which is also returned.

        ``rank`` is sent as a third frame, as a later development branch of the origin does.
        """
        self.write(frames)
        sent = self.sent(frames)
        status = SUCCESS if sent + self.allocated(frames) >= self.total else TRANSFERRING
        self.report(frames, status, rank=rank)
        return status

    def write(self, frames: list[bytes], *, from_start: bool = False) -> None:
        """Writes the requested tokens, from where they lie or (``from_start``) from the first block on."""
        sent, session = self.sent(frames), frames[3].decode()
        first = 0 if from_start else sent // BLOCK
        blocks = [int(part) for part in frames[4].split(b",")]
        count = min(self.total - sent, self.allocated(frames))
        for i, block in enumerate(blocks):
            tokens = min(BLOCK, count - i * BLOCK)
            for at, (array, pointer) in enumerate(zip(self.buffers.all, self.pointers[session], strict=True)):
                row = array[0].nbytes
                length = row * tokens // BLOCK
                if at == AUX_AT:
                    length = row if sent == 0 and i == 0 else 0
                if length > 0:
                    source = array.ctypes.data + (first + i) * row
                    assert self.engine.write(session, source, pointer + block * row, length)

    def report(self, frames: list[bytes], status: int, *, rank: int | None = None) -> None:
        third = [] if rank is None else [text(rank)]
        self.push(frames[1].decode(), int(frames[2]), [frames[0], text(status), *third])

    @staticmethod
    def sent(frames: list[bytes]) -> int:
        return int(frames[6]) if len(frames) >= 8 else 0

    @staticmethod
    def allocated(frames: list[bytes]) -> int:
        return int(frames[7] if len(frames) >= 8 else frames[6])


class OriginBootstrap:
    """The origin's bootstrap server, which answers before its encode ranks are there.

    Attributes:
        sizes: Answer about the sizes: (tp_size, dp_size), which are None until a rank has registered.
        ranks: Ports by (data-parallel group, rank in it). Another rank is answered with ``missing``.
        missing: Status and body of the answer about a rank that has not registered.
        asked: Queries of the requests for ``/route``.
    """

    def __init__(self) -> None:
        self.sizes: tuple[int | None, int | None] = None, None
        self.ranks: dict[tuple[int, int], int] = {}
        self.missing: tuple[int, bytes] = 500, b"500 Internal Server Error"
        self.asked: list[tuple[int, int]] = []
        self.address = ""

    def answer(self, target: str) -> tuple[int, bytes]:
        url = urlsplit(target)
        if url.path != "/route":
            return 200, b"OK"
        query = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
        group, rank = query["target_dp_group"], query["engine_rank"]
        self.asked.append((group, rank))
        if rank == group == -1:
            return 200, json.dumps(
                dict(zip(("embedding_tp_size", "embedding_dp_size"), self.sizes, strict=True))
            ).encode()
        if (group, rank) not in self.ranks:
            return self.missing
        return 200, json.dumps({"rank_ip": "127.0.0.1", "rank_port": self.ranks[group, rank]}).encode()

    @contextmanager
    def running(self) -> Iterator[None]:
        bootstrap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = bootstrap.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.address = f"127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


def text(*numbers: int) -> bytes:
    return ",".join(map(str, numbers)).encode()
