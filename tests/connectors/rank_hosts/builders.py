"""An engine whose ranks are on two hosts. Both are in this process unless a test kills one.

The two differ in nothing else from hosts: they share no memory and no socket.
"""

from __future__ import annotations

import uuid

import msgspec
import numpy as np

from embferry import SendManager
from embferry.connectors.shared.counters import Counters
from embferry.connectors.shared.shape import Shape
from embferry.connectors.shared.shared_rows import ByteRows, SharedRows
from embferry.connectors.vllm import host_claims
from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.consumer import Consumer
from embferry.connectors.vllm.coordinates import Coordinates
from embferry.connectors.vllm.host_receiver import HostReceiver, OtherHost, endpoint_of_scheduler
from embferry.connectors.vllm.other_hosts import OtherHosts
from embferry.connectors.vllm.rank_memory import RankMemory
from embferry.connectors.vllm.workers import Workers

from ..pair import CONFIG, SHAPE, until

HIDDEN = SHAPE.width // 2
"""The model is half as wide as a token of the embedding, as with deepstack."""
HERE, THERE = 1, 2
"""Ranks on the two hosts."""
SECRET = host_claims.new_secret()


class There:
    """Host 1, with ranks of the engine."""

    def __init__(self, config: ConnectorConfig, secret: str = SECRET) -> None:
        name = uuid.uuid4().hex
        host = OtherHost(1, THERE, endpoint_of_scheduler(config, "127.0.0.1"), secret)
        self.receiver = HostReceiver(config, name, host, HIDDEN, SHAPE.dtype)
        self.ranks = [RankMemory(name, rank) for rank in range(THERE)]

    @property
    def kept(self) -> int:
        """The number of embeddings whose memory it keeps."""
        return sum(each.shared is not None for each in list(self.receiver._incoming.values()))

    def rows(self, room: int, rank: int = 0) -> ByteRows:
        """Returns what a rank has mapped, as rows of the embedding."""
        shared = self.ranks[rank].find(room)
        assert shared.shape == Shape(2 * SHAPE.tokens, HIDDEN, SHAPE.dtype)
        return shared.rows.reshape(SHAPE.tokens, SHAPE.token_bytes)

    def has(self, room: int, rows: ByteRows) -> bool:
        """Returns whether every rank has mapped these rows."""
        return all(np.array_equal(self.rows(room, rank), rows) for rank in range(THERE))

    def load(self, rank: int, room: int, number: int) -> None:
        """Records a load, as a rank does."""
        self.ranks[rank].find(room).completed[rank] = number

    def close(self) -> None:
        self.receiver.close()
        for rank in self.ranks:
            rank.close()


class Engine:
    """A consumer with the ranks of host 0. It notices the loss of host 1 by ``config``, and loses no producer."""

    def __init__(self, config: ConnectorConfig) -> None:
        self.counters, name = Counters(), uuid.uuid4().hex
        self.others = OtherHosts(config, 2, HIDDEN, SHAPE.dtype, self.counters)
        self.workers = Workers(name, HERE, self.others)
        consuming = msgspec.structs.replace(config, peer_timeout=CONFIG.peer_timeout)
        self.consumer = Consumer(consuming, self.counters, None, self.workers)
        self.ranks = [RankMemory(name, rank, SECRET) for rank in range(HERE)]

    @property
    def manager(self) -> SendManager:
        """The manager that serves the other host."""
        return self.others._managers.get(self.others._layout)

    def fetch(self, request: str, mm_hash: str, coordinates: Coordinates) -> SharedRows:
        until(lambda: self.consumer.require(request, mm_hash, coordinates))
        shared = self.consumer.find(mm_hash)
        assert shared is not None
        return shared

    def room(self, shared: SharedRows) -> int:
        """Returns the name of the memory on the other host."""
        (room,) = self.workers.rooms(shared)
        return room

    def close(self) -> None:
        self.consumer.close()
        self.workers.close()
        for rank in self.ranks:
            rank.close()
