"""The cache that encoders share, as an encode worker uses it: looks items up before they are encoded, keeps the others.

A request waits for a lookup no longer than ``cache.lookup_timeout``, and never for a write. After a failure of either,
an item is encoded.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import torch

from embferry import __version__
from embferry.cache import address
from embferry.cache.contract import Store
from embferry.cache.encoder_store import Counts, EncoderStore
from embferry.cache.entry import Damaged, Entry, digest_of, model_label
from embferry.cache.folder import FolderStore
from embferry.engine.cache import EmbeddingCache, Pin
from embferry.engine.embedding import Embedding, from_bytes
from embferry.engine.encoder import Encoder
from embferry.engine.media import PreparedItem
from embferry.engine.shape import MediaShape
from embferry.observe.metrics import Metrics
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Layout
from embferry.serve.config import Settings

VERSION = b"embferry encode 1\0"
"""Part of every key: a version that encodes or reads otherwise finds nothing of this one."""


def open_store(settings: Settings) -> Store | None:
    """Opens the store that the settings name, if they name one.

    Raises:
        LocalProtocolError: It cannot be used.
    """
    if settings.cache.url is None:
        return None
    where = address.parse(settings.cache.url)
    try:
        return address.open_store(where, settings.cache.max_bytes, settings.reachable_host)
    except LocalProtocolError as error:
        raise LocalProtocolError(f"{settings.place('cache', 'url')}: {error.detail}") from error


def identity_of(encoder: Encoder) -> bytes:
    """Returns a digest of what decides an embedding beside the digest of its item.

    That covers the item's patches, the weights as they were loaded, the configuration of the vision tower, the dtype,
    the number of threads, and the versions of torch and transformers. The rest is here: what stands in the other fields
    of a token, the instructions of the processor, which change the last bits, and the version of this package.
    """
    config = encoder.config
    factors = {
        "layout": msgspec.to_builtins(Layout(encoder.fields)),
        "model": config.model_type,
        "placeholders": [config.image_token_id, config.video_token_id],
        "merge": encoder.media.merge_size,
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).digest()


def item_key(identity: bytes, shape: MediaShape, tokens: int) -> str:
    """Returns the key of an item's embedding, 64 hexadecimal digits."""
    key = hashlib.sha256(VERSION)
    grid = " ".join(map(str, (*shape.grid, tokens)))
    for part in (identity, shape.kind.encode(), shape.digest, grid.encode()):
        key.update(len(part).to_bytes(8, "little") + part)
    return key.hexdigest()


class Lookup:
    """The search for the embedding of one item of a room. Any thread may call the methods.

    Attributes:
        until: When the room goes on without it, in monotonic seconds.
        is_done: The search has ended.
        is_given_up: Nothing waits for it any more.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self.is_done = self.is_given_up = False
        self._lock = threading.Lock()  # guards all but "until"
        self._pin: Pin | None = None

    def is_wanted(self) -> bool:
        return not self.is_given_up

    def end(self, pin: Pin | None) -> None:
        """Ends the search. ``pin``: on the embedding that was found, held until :meth:`give_up`."""
        with self._lock:
            self.is_done = True
            if not self.is_given_up:
                self._pin, pin = pin, None
        if pin is not None:
            pin.release()

    def give_up(self) -> None:
        """Releases what was found or will be. Idempotent."""
        with self._lock:
            self.is_given_up = True
            pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()


class SharedCache:
    """The lookups and writes of one encode worker. Any thread may call the methods, none of which waits for the store.

    An embedding that was found is put into the worker's own cache, from where it goes to its room.
    """

    def __init__(
        self,
        store: Store,
        encoder: Encoder,
        cache: EmbeddingCache,
        counts: Counts,
        settings: Settings,
        on_end: Callable[[], object],
    ) -> None:
        """Starts the threads.

        Args:
            store: Where embeddings are. Closed with this object.
            encoder: The encoder whose embeddings are kept.
            cache: The worker's own cache.
            counts: Counts.
            settings: All of them.
            on_end: Called when a lookup has ended, on a thread that reads. It may not block.
        """
        self._store = EncoderStore(store, counts, settings.cache.lookup_timeout)
        self._cache, self._on_end = cache, on_end
        self._identity, self._layout = identity_of(encoder), Layout(encoder.fields)
        self._model = model_label(settings.model_name)

    def search(self, item: PreparedItem) -> Lookup | None:
        """Begins to look an item up. Returns None if it is in the worker's own cache, or cannot be looked up now."""
        if self._cache.holds(item.digest):
            return None
        lookup, shape = Lookup(time.monotonic() + self._store.lookup_timeout), item.shape
        return lookup if self._store.search(partial(self._search, lookup, shape, item.num_tokens)) else None

    def is_searching(self, lookup: Lookup | None) -> bool:
        """Returns whether a room has to wait for a lookup, which is given up when its time is over."""
        if lookup is None or lookup.is_done or lookup.is_given_up:
            return False
        if time.monotonic() < lookup.until:
            return True
        lookup.give_up()
        self._store.missed("late")
        return False

    def keep(self, item: PreparedItem, embedding: Embedding) -> None:
        """Writes an embedding that was encoded, some time."""
        key = item_key(self._identity, item.shape, item.num_tokens)
        self._store.write(partial(self._entry, key, embedding), embedding.nbytes)

    def close(self) -> None:
        """Writes what is queued, for a bounded time. A store that hangs stays open until the process ends."""
        self._store.close()

    # The threads that read

    def _search(self, lookup: Lookup, shape: MediaShape, tokens: int) -> None:
        pin = None
        try:
            if not lookup.is_given_up and not self._cache.holds(shape.digest):
                pin = self._load(lookup, shape, tokens)
        finally:
            lookup.end(pin)
            self._on_end()

    def _load(self, lookup: Lookup, shape: MediaShape, tokens: int) -> Pin | None:
        made: list[np.ndarray] = []

        def accept(entry: Entry) -> memoryview:
            self._check(entry, tokens)
            made.append(np.empty(entry.nbytes, np.uint8))
            return made[0].data

        key = item_key(self._identity, shape, tokens)
        if self._store.read(key, accept, lookup.is_wanted) is None:
            return None
        return self._cache.put(shape.digest, self._embedding(shape, tokens, made[0]))

    def _check(self, entry: Entry, tokens: int) -> None:
        """Raises Damaged unless an entry has the shape of the item's embedding."""
        if entry.layout != self._layout:
            raise Damaged(f"its layout is {entry.layout}; this model has {self._layout}")
        if entry.tokens != tokens:
            raise Damaged(f"it has {entry.tokens} tokens; the item has {tokens}")

    def _embedding(self, shape: MediaShape, tokens: int, data: np.ndarray) -> Embedding:
        """Returns the embedding with these bytes, whose fields lie one after the other."""
        tensors, at = {}, 0
        for field in self._layout.fields:
            end = at + tokens * field.token_bytes
            tensors[field.name] = from_bytes(field, data[at:end].reshape(tokens, field.token_bytes))
            at = end
        return Embedding(shape, tensors)

    # The thread that writes

    def _entry(self, key: str, embedding: Embedding) -> tuple[Entry, memoryview]:
        rows, tokens = embedding.fields(), embedding.num_tokens
        data = np.concatenate([rows[field.name].reshape(-1) for field in self._layout.fields]).data
        digest = digest_of(self._layout, tokens, lambda at, end: (data[at:end],))
        return Entry(key, self._layout, tokens, digest, self._model), data


class SharedCacheMetrics:
    """The counts of a store among a worker's metrics."""

    def __init__(self, metrics: Metrics, store: Store) -> None:
        prefix = "embferry_encode_shared_cache"
        self._hits = metrics.counter(f"{prefix}_hits", "Embeddings found in the cache that encoders share")
        about = "Embeddings not found in that cache, by reason"
        self._misses = metrics.counter(f"{prefix}_misses", about, ["reason"])
        self._written = metrics.counter(f"{prefix}_written_bytes", "Bytes that this worker wrote into that cache")
        about = "Encoded embeddings that were not written into it, by reason"
        self._dropped = metrics.counter(f"{prefix}_dropped", about, ["reason"])
        if isinstance(store, FolderStore):
            about = "Bytes in the folder that encoders share, as this worker saw it last"
            metrics.gauge(f"{prefix}_bytes", about).set_function(lambda: store.nbytes)

    def hit(self) -> None:
        self._hits.inc()

    def missed(self, reason: str) -> None:
        self._misses.labels(reason).inc()

    def wrote(self, nbytes: int) -> None:
        self._written.inc(nbytes)

    def dropped(self, reason: str) -> None:
        self._dropped.labels(reason).inc()
