"""How fast whole embeddings cross, by transport and by the size of the receive pool.

    python benchmarks/transfers.py [--tokens 16384] [--rounds 5]

Both sides run in one process, everything included: grants, control messages, checksums, gathering. Absolute numbers
differ from machine to machine and from run to run; compare within one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.common.conn_multimodal import (
    EmbeddingReceiveManager,
    EmbeddingSendManager,
    Rows,
    rows_of,
    wait,
)
from embferry.disaggregation.memory.conn_multimodal import MemoryTransport
from embferry.disaggregation.protocol.layout import Field, Geometry, Layout
from embferry.disaggregation.shm.conn_multimodal import ShmTransport
from embferry.disaggregation.tcp.conn_multimodal import TcpTransport

HIDDEN = 3584
BLOCK_SIZE = 128
LAYOUT = Layout((Field("input_embeddings", "bfloat16", HIDDEN),))
TRANSPORTS: dict[str, Callable[[], Transport]] = {"memory": MemoryTransport, "shm": ShmTransport, "tcp": TcpTransport}
SHARES = (1, 4, 16)
"""The pool holds one part in so many of the embedding."""
TIMEOUT_S = 60.0


def measure(make: Callable[[], Transport], rows: Rows, tokens: int, blocks: int, rounds: int) -> tuple[float, int]:
    """(median seconds, transfers of the last round)."""
    encode_side = EmbeddingSendManager(LAYOUT, [make()])
    language_side = EmbeddingReceiveManager(Geometry(LAYOUT, num_blocks=blocks, block_size=BLOCK_SIZE), [make()])
    seconds, transfers = [], 0
    try:
        for room in range(1, rounds + 2):
            sender = encode_side.open(room)
            sender.init(tokens, b"bench")
            sender.send_embedding(rows)
            began = time.perf_counter()
            receiver = language_side.open(room, encode_side.endpoint)
            receiver.init()
            wait(receiver, TIMEOUT_S)
            seconds.append(time.perf_counter() - began)
            transfers = receiver.transfers
            receiver.clear()
            sender.clear()
    finally:
        language_side.close()
        encode_side.close()
    return statistics.median(seconds[1:]), transfers  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast whole embeddings cross.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    random = np.random.default_rng(0).integers(0, 256, (options.tokens, HIDDEN * 2), np.uint8)
    size = random.nbytes
    print(
        f"{size / 1e6:.0f} MB ({options.tokens} tokens of {HIDDEN} bfloat16), {os.cpu_count()} cores, median of rounds"
    )
    print(f"{'transport':<10} {'pool':>9} {'transfers':>10} {'ms':>8} {'GB/s':>6}")
    for name, make in TRANSPORTS.items():
        for share in SHARES:
            blocks = max(1, options.tokens // share // BLOCK_SIZE)
            rows = rows_of({"input_embeddings": random})
            seconds, transfers = measure(make, rows, options.tokens, blocks, options.rounds)
            pool = blocks * BLOCK_SIZE * HIDDEN * 2 / 1e6
            print(
                f"{name:<10} {pool:6.0f} MB {transfers:10} {seconds * 1e3:8.1f} {size / seconds / 1e9:6.2f}", flush=True
            )


if __name__ == "__main__":
    main()
