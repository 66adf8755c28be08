"""Pairs of managers over each transport, and embeddings to send."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from embferry import EmbeddingReceiver, EmbeddingSender, Fields, ReceiveManager, SendManager, Sink
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.settings import TransferSettings
from embferry.transfer import writer
from embferry.transfer.handle import Handle
from embferry.transfer.manager import Manager
from embferry.transfer.runtime import ThreadRuntime
from embferry.transports.contract import Transport
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport
from tests import lock_order

SECONDS = 60.0
"""Longest wait for an event. Far longer than any takes, so that a busy machine does not fail a test."""

TRANSPORTS: tuple[type[Transport], ...] = (InMemoryTransport, ShmTransport, TcpTransport, HttpTransport)

LAYOUT = Layout(
    (
        Field("input_embeddings", "bfloat16", 24),
        Field("deepstack_embeddings", "bfloat16", 48),
        Field("fill_ids", "int32", 1),
        Field("mrope_positions", "int32", 3),
    )
)


def embedding(tokens: int, seed: int = 0) -> Fields:
    """Returns an embedding of random bytes: uint8 ``[tokens, token_bytes]`` for each field."""
    rng = np.random.default_rng(seed)
    return {f.name: rng.integers(0, 256, (tokens, f.token_bytes), np.uint8) for f in LAYOUT.fields}


def same(a: Fields, b: Fields) -> bool:
    """Returns whether two embeddings have the same bytes."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@dataclass
class Pair:
    """A send manager and a receive manager over the same transport.

    Attributes:
        receiving: The receive manager.
        sending: The send manager.
        transport: The transport of both.
        extra: Further send managers, to be closed with the pair.
    """

    receiving: ReceiveManager
    sending: SendManager
    transport: type[Transport]
    extra: list[SendManager] = field(default_factory=list)

    def receiver(self, room: int | None = None, sink: Sink | None = None) -> EmbeddingReceiver:
        return self.receiving.open(room or secrets.randbits(60), self.sending.endpoint, sink)

    def sender(
        self, room: int, rows: Fields, *, digest: bytes = b"digest", ready: int | None = None
    ) -> EmbeddingSender:
        sender = self.sending.open(room)
        sender.init(len(rows["fill_ids"]), digest)
        sender.send_embedding(rows, ready)
        return sender


MakePair = Callable[..., Pair]


@pytest.fixture(params=[0, writer.AT_ONCE_BYTES], ids=["checksums in steps", "checksums at once"])
def checksums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender takes the checksums of chunks in steps, or when their writes start."""
    monkeypatch.setattr(writer, "AT_ONCE_BYTES", request.param)


def advance_clock(manager: Manager[Any], seconds: float) -> None:
    """Moves the clock of a manager forward: its time-outs expire without a wait."""
    runtime = manager._runtime
    before = runtime.now
    runtime.now = lambda: before() + seconds  # type: ignore[method-assign]
    manager.wake()


def let_turn(manager: Manager[Any]) -> None:
    """Waits until the driver has made a turn: otherwise a busy machine lets several time-outs expire at once."""
    runtime = manager._runtime
    assert isinstance(runtime, ThreadRuntime)
    for _ in range(2):
        reached = threading.Event()
        runtime._loop.call(reached.set)
        assert reached.wait(SECONDS)


def let_expire(manager: Manager[Any], seconds: float, end: Handle) -> None:
    """Moves the clock on until ``end`` has ended: a message that is still on its way may start its time-out anew."""
    changed = threading.Event()
    stop_waking = end.wake_on_change(changed.set)
    for _ in range(100):
        advance_clock(manager, seconds)
        let_turn(manager)
        if end.has_ended or (changed.wait(0.1) and end.has_ended):
            break
    stop_waking()


def kill(manager: Manager[Any]) -> None:
    """Ends the thread and the connections of a manager without a message, as in a killed process."""
    runtime = manager._runtime
    assert isinstance(runtime, ThreadRuntime)
    runtime._turn = lambda: None
    runtime.stop()


@pytest.fixture(autouse=True)
def _lock_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "simulation" in request.path.parts:  # its mutants take locks in the wrong order, which the stories notice
        yield
        return
    with lock_order.checked(monkeypatch):
        yield


@pytest.fixture(params=TRANSPORTS, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> type[Transport]:
    return request.param


@pytest.fixture
def make_pair(transport: type[Transport]) -> Iterator[MakePair]:
    """Yields a function that makes a pair. Afterwards checks and closes the managers."""
    pairs: list[Pair] = []

    def make(num_blocks: int = 4, block_size: int = 16, layout: Layout = LAYOUT, **settings: float) -> Pair:
        numbers = TransferSettings(**settings)
        geometry = Geometry(LAYOUT, num_blocks, block_size)
        receiving = ReceiveManager(geometry, [transport()], settings=numbers)
        pairs.append(Pair(receiving, SendManager(layout, [transport()], settings=numbers), transport))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.receiving.allocator.check_integrity()
        for manager in (pair.sending, *pair.extra, pair.receiving):
            assert manager.fault is None
            manager.close()
