"""A pair of managers over each transport, and embeddings to send."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from embferry import EmbeddingReceiver, EmbeddingSender, Fields, ReceiveManager, SendManager, Sink
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Transport
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport

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
    """Random bytes, in the shape of an embedding."""
    rng = np.random.default_rng(seed)
    return {f.name: rng.integers(0, 256, (tokens, f.token_bytes), np.uint8) for f in LAYOUT.fields}


def same(a: Fields, b: Fields) -> bool:
    """Whether two embeddings are the same, byte by byte."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@dataclass
class Pair:
    """An encode side and a language side, joined by one transport."""

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


@pytest.fixture(params=TRANSPORTS, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> type[Transport]:
    return request.param


@pytest.fixture
def make_pair(transport: type[Transport]) -> Iterator[MakePair]:
    """Makes pairs; closes them afterwards and checks that their pools are whole."""
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
