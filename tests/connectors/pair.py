"""Producer and consumer of the vLLM connector without vLLM."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import closing

import msgspec
import numpy as np

from embferry.connectors.shared.counters import Counters
from embferry.connectors.shared.shape import Shape, digest_of
from embferry.connectors.shared.shared_rows import ByteRows, SharedRows
from embferry.connectors.vllm.channel import Publish, publish
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.consumer import Consumer
from embferry.connectors.vllm.coordinates import KEY, Coordinates, coordinates_in
from embferry.connectors.vllm.producer import Producer
from embferry.connectors.vllm.rank_memory import RankMemory
from embferry.connectors.vllm.router_client import RouterClient
from embferry.connectors.vllm.workers import Workers

SHAPE = Shape(tokens=300, width=64, dtype="float32")
TOKENS, NBYTES = SHAPE.tokens, SHAPE.nbytes
GUARD_S = 60.0
"""Time after which a condition that should become true counts as a failure."""
CONFIG = ConnectorConfig(transports=("shm",), num_blocks=4, block_size=8, peer_timeout=GUARD_S)
"""No producer is lost by its silence here. The pool is smaller than an embedding."""
NOTICES_LOSS_S, NOTICES_LOSS_SOON_S = 2.0, 0.5
"""Values of ``peer_timeout`` for tests in which a producer is lost. With the shorter one a busy machine may lose the
second producer as well, so it is for tests that end with an error anyway."""


def with_peer_timeout(config: ConnectorConfig, seconds: float) -> ConnectorConfig:
    return msgspec.structs.replace(config, peer_timeout=seconds)


def rows_like(seed: int) -> ByteRows:
    return np.random.default_rng(seed).integers(0, 255, (SHAPE.tokens, SHAPE.token_bytes), dtype=np.uint8)


class Encode:
    """A producer and its worker."""

    def __init__(self, config: ConnectorConfig = CONFIG) -> None:
        self.name = uuid.uuid4().hex
        self.producer_counters = Counters()
        self.workers = Workers(self.name, ranks=1)
        self.producer = Producer(config, self.workers, self.producer_counters)

    def publish(self, mm_hash: str, seed: int = 0, *, encoded: bool = True) -> ByteRows:
        """Publishes an embedding as a worker does, and returns its bytes."""
        rows = rows_like(seed)
        with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
            np.copyto(shared.rows, rows)
            published = Publish(mm_hash, SHAPE, digest_of(rows, SHAPE), encoded)
            publish(self.name, published, shared.fd, GUARD_S)
        return rows

    def offer(self, mm_hash: str, room: int | None = None, token: str | None = None) -> Coordinates:
        found = coordinates_in({KEY: self.producer.offer(mm_hash, room) | {"failover_token": token}})
        assert found is not None
        return found

    def withdraw(self, mm_hash: str) -> None:
        """Ends the offers, and evicts an embedding. Its claims are refused from now on."""
        for manager in self.producer.offers.sources():
            self.producer.offers.end_all(manager)
        del self.producer.cache._embeddings[mm_hash]

    def produced(self, name: str, label: str = "") -> int:
        """A counter of the producer."""
        return self.producer_counters.read().get((name, label), 0)

    def close(self) -> None:
        self.producer.close()
        self.workers.close()


class Language:
    """A consumer and its worker."""

    def __init__(self, config: ConnectorConfig = CONFIG, router: RouterClient | None = None) -> None:
        self.counters = Counters()
        name = uuid.uuid4().hex
        self.consumer_workers = Workers(name, ranks=1)
        self.consumer = Consumer(config, self.counters, router, self.consumer_workers)
        self.rank = RankMemory(name, 0)

    def fetch(self, request: str, mm_hash: str, coordinates: Coordinates) -> ByteRows:
        until(lambda: self.consumer.require(request, mm_hash, coordinates))
        return self.rows(mm_hash)

    def rows(self, mm_hash: str) -> ByteRows:
        shared = self.consumer.find(mm_hash)
        assert shared is not None
        return self.rank.find(shared.key).rows

    def count(self, name: str, label: str = "") -> int:
        """A counter of the consumer."""
        return self.counters.read().get((name, label), 0)

    def close(self) -> None:
        self.consumer.close()
        self.consumer_workers.close()
        self.rank.close()


class Pair(Encode, Language):
    def __init__(self, config: ConnectorConfig) -> None:
        Encode.__init__(self, config)
        Language.__init__(self, config)

    def close(self) -> None:
        Language.close(self)
        Encode.close(self)


def until(condition: Callable[[], object]) -> None:
    """Polls as often as the engine's loop does between two steps."""
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, f"not true within {GUARD_S:g} s"
        time.sleep(0.001)
