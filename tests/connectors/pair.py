"""Producer and consumer of the vLLM connector without vLLM, as the tests use them."""

from __future__ import annotations

import time
import uuid

import numpy as np
import numpy.typing as npt

from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.consumer import Consumer
from embferry.connectors.vllm.coordinates import KEY, Coordinates, coordinates_in, digest_of
from embferry.connectors.vllm.producer import Producer
from embferry.connectors.vllm.router import Router
from embferry.connectors.vllm.shared import SharedRows, attach
from embferry.connectors.vllm.shelf import Item, ToShelf
from embferry.connectors.vllm.tally import Tally

WIDTH, DTYPE, TOKENS = 64, "float32", 300
NBYTES = TOKENS * WIDTH * 4
CONFIG = ConnectorConfig(transports=("shm",), num_blocks=4, block_size=8, peer_timeout=0.5)

Fields = npt.NDArray[np.uint8]


def rows_like(seed: int) -> Fields:
    return np.random.default_rng(seed).integers(0, 255, (TOKENS, WIDTH * 4), dtype=np.uint8)


class Encode:
    """A producer and its worker."""

    def __init__(self, config: ConnectorConfig = CONFIG) -> None:
        name = uuid.uuid4().hex
        self.tally = Tally()
        self.producer = Producer(config, name, self.tally)
        self.worker = ToShelf(name, timeout=5)

    def publish(self, mm_hash: str, seed: int = 0, *, encoded: bool = True) -> Fields:
        """As a worker does; answers the bytes."""
        rows = rows_like(seed)
        shared = SharedRows.make(*rows.shape)
        np.copyto(shared.rows, rows)
        self.worker.put(Item(mm_hash, shared.place, DTYPE, WIDTH, digest_of(shared.rows, DTYPE, WIDTH), encoded))
        shared.close()
        return rows

    def where(self, mm_hash: str, room: int | None = None, token: str | None = None) -> Coordinates:
        found = coordinates_in({KEY: self.producer.offer(mm_hash, room) | {"replacement": token}})
        assert found is not None
        return found

    def close(self) -> None:
        self.producer.close()


class Language:
    """A consumer."""

    def __init__(self, config: ConnectorConfig = CONFIG, router: Router | None = None, ranks: int = 1) -> None:
        self.tally = Tally()
        self.consumer = Consumer(config, self.tally, router, ranks)

    def fetch(self, request: str, mm_hash: str, where: Coordinates, seconds: float = 5) -> Fields:
        until(lambda: self.consumer.want(request, mm_hash, where), seconds)
        return self.rows(mm_hash)

    def rows(self, mm_hash: str) -> Fields:
        shared = self.consumer.load(mm_hash).shared
        assert shared is not None
        return attach(shared.place).rows

    def count(self, name: str, label: str = "") -> float:
        return self.tally.read().counts.get((name, label), 0)

    def close(self) -> None:
        self.consumer.close()


class Pair(Encode, Language):
    def __init__(self, config: ConnectorConfig) -> None:
        Encode.__init__(self, config)
        self.made = self.tally
        Language.__init__(self, config)

    def close(self) -> None:
        self.consumer.close()
        self.producer.close()


def until(condition: object, seconds: float = 5) -> None:
    """Looks as often as the engine's loop does between two steps."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
