"""A producer with the cache that encoders share, without vLLM, and a store whose calls a test decides."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import torch

from embferry.cache.contract import Store
from embferry.connectors.shared.counters import Counters
from embferry.connectors.shared.shape import digest_of
from embferry.connectors.shared.shared_rows import ByteRows, SharedRows
from embferry.connectors.vllm.channel import Publish, publish
from embferry.connectors.vllm.item_key import Item
from embferry.connectors.vllm.producer import Producer
from embferry.connectors.vllm.shared_cache import SharedCache
from embferry.connectors.vllm.workers import Workers

from .pair import CONFIG, GUARD_S, SHAPE, rows_like, until


def item(name: str, content: int = 0, tokens: int = SHAPE.tokens) -> Item:
    pixels = SimpleNamespace(data=torch.full((4,), float(content)))
    return Item(name, "image", {"pixel_values": pixels}, tokens)


class Encoder:
    """A producer, its worker, and its use of the shared cache."""

    def __init__(
        self,
        store: Store,
        identity: bytes = b"model",
        *,
        timeout: float = GUARD_S,
        hidden: int = SHAPE.width,
        dtype: str = SHAPE.dtype,
        limit: int = 1 << 30,
        identify: Callable[[], bytes] | None = None,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.counters = Counters()
        self.workers = Workers(self.name, ranks=1)
        self.producer = Producer(CONFIG, self.workers, self.counters)
        self.requests = 0
        try:
            self.shared = SharedCache(
                store,
                identify or (lambda: identity),
                self.producer.cache,
                self.counters,
                model="a model",
                ranks=1,
                dtype=dtype,
                hidden=hidden,
                max_embedding_bytes=limit,
                lookup_timeout=timeout,
            )
        except BaseException:
            self.producer.close()
            self.workers.close()
            raise

    def ask(self, asked: Item, seed: int = 0) -> ByteRows:
        """Runs a request as vLLM does, and returns the embedding. Encodes it if it is not found."""
        self.requests += 1
        request = f"request {self.requests}"
        self.producer.hold(request, [asked.mm_hash])
        until(lambda: not self.shared.is_searching(request, [asked], self.producer.find))
        if self.producer.find(asked.mm_hash) is None:
            self.encode(asked, self.shared.key(request, asked.mm_hash), seed)
        self.shared.forget(request, [asked.mm_hash])
        self.producer.release(request)
        found = self.producer.find(asked.mm_hash)
        assert found is not None
        return found.shared.rows

    def encode(self, asked: Item, key: str, seed: int) -> None:
        rows = rows_like(seed)
        with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
            np.copyto(shared.rows, rows)
            published = Publish(asked.mm_hash, SHAPE, digest_of(rows, SHAPE), encoded=True, content=key)
            publish(self.name, published, shared.fd, GUARD_S)

    def count(self, name: str, label: str = "") -> int:
        return self.counters.read().get((name, label), 0)

    @property
    def encodes(self) -> int:
        return self.count("items_encoded")

    def close(self) -> None:
        self.shared.close()
        self.producer.close()
        self.workers.close()
