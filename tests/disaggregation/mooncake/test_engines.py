"""Both sides in processes of their own on the real Mooncake engine, compared byte by byte."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embferry.disaggregation import wires
from embferry.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingBootstrapServer, origin_layout
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings

from .builders import GEOMETRY, ROOM, WAIT_S, equal, eventually
from .origin_peers import BLOCK, BLOCKS, embedding

pytestmark = [pytest.mark.integration, pytest.mark.engines]

ROOT = Path(__file__).parents[3]


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.disaggregation.mooncake.peer_process", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("tokens", "transfers"), [(1, 1), (24, 1), (90, 4)], ids=["token", "single", "resumed"])
def test_our_receiver_gets_every_byte_from_a_sender_of_the_origin(tokens: int, transfers: int) -> None:
    transfer = TransferSettings(default_allocate_tokens=3 * BLOCK)
    with (
        MooncakeEmbeddingBootstrapServer() as bootstrap,
        running("sender", tokens, 1, bootstrap.port),
        wires.receive_manager(GEOMETRY, wire="origin", transfer=transfer) as manager,
    ):
        hog = manager.allocate((BLOCKS - 3) * BLOCK, 99)
        assert hog is not None
        receiver = manager.open(ROOM, f"127.0.0.1:{bootstrap.port}")
        receiver.init()
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), embedding(tokens))
        assert receiver.transfers == transfers
        assert list(receiver.aux[:2]) == [tokens, -7]
        assert manager.allocator.available == 3


@pytest.mark.parametrize(
    ("tokens", "initial", "further", "parts"), [(20, 3, 1, 1), (90, 4, 3, 4)], ids=["single", "resumed"]
)
def test_our_sender_writes_every_byte_to_a_receiver_of_the_origin(
    tokens: int, initial: int, further: int, parts: int
) -> None:
    with wires.send_manager(GEOMETRY, wire="origin") as manager:
        sender = manager.open(ROOM)
        sender.init()
        sender.send_embedding(embedding(tokens))
        with running("receiver", "127.0.0.1", manager.port, tokens, initial, further) as process:
            for _ in range(parts):
                assert line(process) == "equal"
            assert line(process) == f"{tokens} {tokens}"
            sender.wait(WAIT_S)


@pytest.mark.parametrize("tokens", [20, 250])
def test_our_two_sides_transfer_every_byte(tokens: int) -> None:
    rooms = 3
    with (
        running("ours", tokens, rooms) as process,
        wires.receive_manager(
            GEOMETRY, wire="origin", transfer=TransferSettings(default_allocate_tokens=4 * BLOCK)
        ) as manager,
    ):
        address = line(process)
        receivers = [manager.open(ROOM + i, address) for i in range(rooms)]
        for receiver in receivers:
            receiver.init()
        for receiver in receivers:
            receiver.wait(WAIT_S)
            assert equal(receiver.arrays(), embedding(tokens))
        assert line(process) == "sent"
        assert manager.allocator.available == BLOCKS


def test_an_aborted_room_frees_its_blocks_and_the_next_one_uses_another_mapping() -> None:
    with (
        running("ours", 20, 2) as process,
        wires.receive_manager(GEOMETRY, wire="origin") as manager,
    ):
        address = line(process)
        aborted = manager.open(1, address)  # a room that the encode side does not know
        aborted.init(manager.allocate(BLOCKS * BLOCK, 1))
        while aborted.encode_rank is None:
            aborted.poll()
        aborted.abort()
        assert manager.allocator.available == BLOCKS
        for i in range(2):
            receiver = manager.open(ROOM + i, address)
            receiver.init()
            receiver.wait(WAIT_S)
            assert equal(receiver.arrays(), embedding(20))
        assert line(process) == "sent"


@pytest.mark.parametrize("ending", ["goes on", "dies"])
def test_a_sender_stopped_in_the_middle_of_a_write_changes_no_byte_after_the_abort(ending: str) -> None:
    wide = Geometry(origin_layout(8192), num_blocks=64, block_size=64)
    size = wide.layout.fields[0].token_bytes * wide.block_size * wide.num_blocks
    with (
        MooncakeEmbeddingBootstrapServer() as bootstrap,
        wires.receive_manager(wire="origin", geometry=wide) as manager,
        running("flood", size, bootstrap.port) as process,
    ):
        receiver = manager.open(ROOM, f"127.0.0.1:{bootstrap.port}")
        receiver.init(manager.allocate(64 * 64, ROOM))
        assert line(process) == "begun"
        memory = manager.buffers.field("input_embeddings").reshape(-1)
        eventually(lambda: bool(memory[size // 2 : size // 2 + 64].all()))
        process.send_signal(signal.SIGSTOP)
        receiver.abort()
        assert manager.allocator.available == 64
        memory[:] = 0
        if ending == "goes on":
            process.send_signal(signal.SIGCONT)
            assert "False" in line(process)
        else:
            process.kill()
            process.wait(WAIT_S)
        assert not memory.any()
        if ending == "dies":
            process.returncode = 0  # the test has killed it


def test_the_example_of_the_documentation_runs_as_written() -> None:
    page = (ROOT / "docs" / "origin-wire.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "100 tokens in 4 transfers; equal: True\n"
