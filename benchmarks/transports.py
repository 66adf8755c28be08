"""Goodput of one 64 MiB write between two processes, beside the limit of each transport.

Run ``python benchmarks/transports.py``. A transport and its limit take turns, write by write, so that other work of the
machine affects both alike.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from embferry.memory.buffers import MultimodalDataBuffers, source_pieces
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transports.contract import Transport, Window, Written
from embferry.transports.shm import ShmTransport
from embferry.transports.tcp import TcpTransport

SIZE = 64 << 20
GEOMETRY = Geometry(Layout((Field("input_embeddings", "bfloat16", 4096),)), num_blocks=128, block_size=64)
ADJACENT = tuple(range(128))
SCATTERED = tuple(np.random.default_rng(1).permutation(128).tolist())
TRANSPORTS: dict[str, type[ShmTransport] | type[TcpTransport]] = {"shm": ShmTransport, "tcp": TcpTransport}
WARM_UP, ROUNDS = 2, 5


def main() -> None:
    if len(sys.argv) > 1:
        send(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
        return
    for name, make in TRANSPORTS.items():
        buffers, transport = MultimodalDataBuffers(GEOMETRY, shared=True), make()
        handle = transport.register(buffers)
        transport.admit(Window(1, ADJACENT))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            raw = threading.Thread(target=receive_raw, args=(listener,))
            raw.start()
            port = str(listener.getsockname()[1])
            subprocess.run([sys.executable, __file__, name, handle.hex(), port], check=True, timeout=120)
            raw.join()
        transport.close()
        buffers.close()


def send(name: str, handle: bytes, port: int) -> None:
    """Runs in the sending process, and prints the figures of one transport."""
    source = np.random.default_rng(0).integers(0, 256, (8192, 8192), np.uint8)
    shared = MultimodalDataBuffers(GEOMETRY, shared=True).input_embeddings.reshape(source.shape)
    private, woken = np.empty_like(source), threading.Event()
    transport = TRANSPORTS[name](woken.set)
    transport.connect(handle)
    with socket.create_connection(("127.0.0.1", port)) as sock:

        def raw() -> None:
            sock.sendall(source.data.cast("B"))
            sock.recv(1)

        limits: dict[str, dict[str, Callable[[], None]]] = {
            "shm": {
                "np.copyto, private memory": lambda: np.copyto(private, source),
                "np.copyto, shared memory": lambda: np.copyto(shared, source),
            },
            "tcp": {"sendall / recv_into": raw},
        }
        take_turns(
            limits[name]
            | {
                f"{name}, adjacent blocks": lambda: write(transport, woken, handle, source, ADJACENT),
                f"{name}, 128 scattered blocks": lambda: write(transport, woken, handle, source, SCATTERED),
            }
        )
    transport.close()


def write(
    transport: Transport, woken: threading.Event, handle: bytes, source: np.ndarray, blocks: tuple[int, ...]
) -> None:
    pieces = source_pieces(GEOMETRY, {"input_embeddings": source}, 0, 8192, blocks, 0)
    transport.write(handle, 1, blocks, pieces, 1)
    while not (events := transport.poll()):
        woken.wait(10)
        woken.clear()
    assert events == [Written(1)], events


def take_turns(candidates: dict[str, Callable[[], None]]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UP + ROUNDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:28} {SIZE / statistics.median(times[WARM_UP:]) / 1e9:6.2f} GB/s", flush=True)


def receive_raw(listener: socket.socket) -> None:
    """Receives on one connection, and answers each :data:`SIZE` bytes with one byte."""
    buffer, got = memoryview(bytearray(SIZE)), 0
    connection, _ = listener.accept()
    with connection:
        while count := connection.recv_into(buffer[got:]):
            got += count
            if got == SIZE:
                connection.sendall(b"x")
                got = 0


if __name__ == "__main__":
    main()
