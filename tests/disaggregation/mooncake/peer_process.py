"""A peer in a process of its own, on the real engine. Its arguments are the command; it prints one result a line.

- ``sender TOKENS ROOMS BOOTSTRAP``: an encode rank of the origin that serves ROOMS rooms one after another.
- ``receiver HOST PORT TOKENS INITIAL FURTHER``: a language rank of the origin that requests INITIAL blocks first and
  FURTHER blocks in each resume. Prints ``equal`` or ``different`` for each transfer.
- ``flood BYTES BOOTSTRAP``: an encode rank of the origin that answers a request with 16 writes of BYTES bytes to its
  first buffer. Prints ``begun``, then which writes succeeded.
- ``ours TOKENS ROOMS``: our encode side with a bootstrap server. Prints its address, and ends when its input ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from embferry.disaggregation.mooncake.conn_multimodal import EncodeManager, MooncakeEmbeddingBootstrapServer

from .builders import GEOMETRY, ROOM, WAIT_S, equal, register_rank
from .origin_peers import BLOCK, SUCCESS, OriginReceiver, OriginSender, embedding


class RealEngine:
    """The Mooncake Transfer Engine as the origin uses it: synchronous writes, its ``host:port`` as session id."""

    def __init__(self) -> None:
        os.environ.setdefault("MC_FORCE_TCP", "1")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        from mooncake.engine import TransferEngine

        self.engine: Any = TransferEngine()
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self.session_id = f"127.0.0.1:{self.engine.get_rpc_port()}"

    def register(self, address: int, length: int) -> None:
        assert self.engine.register_memory(address, length) == 0

    def write(self, session: str, source: int, target: int, length: int) -> bool:
        return bool(self.engine.transfer_sync_write(session, source, target, length) == 0)


def sender(tokens: str, rooms: str, bootstrap: str) -> None:
    peer = OriginSender(RealEngine())
    peer.encode(embedding(int(tokens)))
    server = MooncakeEmbeddingBootstrapServer(port=int(bootstrap))  # only for its address: it runs in another process
    register_rank(server, peer.port)
    over = 0
    while over < int(rooms):
        over += peer.answer(peer.hear()) == SUCCESS
    sys.stdin.read()


def flood(size: str, bootstrap: str) -> None:
    peer = OriginSender(RealEngine())
    source = np.ones(int(size), np.uint8)
    peer.engine.register(source.ctypes.data, source.nbytes)
    register_rank(MooncakeEmbeddingBootstrapServer(port=int(bootstrap)), peer.port)
    session = peer.hear()[3].decode()
    print("begun", flush=True)
    written = [
        peer.engine.write(session, source.ctypes.data, peer.pointers[session][0], source.nbytes) for _ in range(16)
    ]
    print(*written, flush=True)


def receiver(host: str, port: str, tokens: str, initial: str, further: str) -> None:
    peer, rows = OriginReceiver(RealEngine(), host, int(port)), embedding(int(tokens))
    peer.register()
    blocks = list(range(11, 11 - int(initial), -1))
    peer.init(ROOM, blocks)
    sent = 0
    while True:
        status = int(peer.status()[1])
        count = min(len(blocks) * BLOCK, int(tokens) - sent)
        same = equal(peer.take(blocks, count), {name: array[sent : sent + count] for name, array in rows.items()})
        print("equal" if same else "different", flush=True)
        sent += count
        if status == SUCCESS:
            break
        blocks = [(blocks[-1] + 2 * i) % 12 for i in range(1, 1 + int(further))]
        peer.resume(ROOM, blocks, sent)
    print(sent, int(peer.buffers.aux[11, 0]), flush=True)


def ours(tokens: str, rooms: str) -> None:
    with (
        MooncakeEmbeddingBootstrapServer() as bootstrap,
        EncodeManager(GEOMETRY, bootstrap_url=bootstrap.url) as manager,
    ):
        senders = [manager.open(ROOM + i) for i in range(int(rooms))]
        for one in senders:
            one.init()
            one.send_embedding(embedding(int(tokens)))
        print(f"127.0.0.1:{bootstrap.port}", flush=True)
        for one in senders:
            one.wait(WAIT_S)
        print("sent", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    {"sender": sender, "receiver": receiver, "flood": flood, "ours": ours}[sys.argv[1]](*sys.argv[2:])
