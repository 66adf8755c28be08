"""The cache that encoders share, as a producer uses it: looks items up before vLLM encodes them, keeps what it encoded.

A request waits for a lookup no longer than ``lookup_timeout``, and never for a write. After a failure of either, an
item is encoded.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from embferry import EmbeddingTransferError, LocalProtocolError
from embferry.cache import address
from embferry.cache.contract import Store
from embferry.cache.encoder_store import EncoderStore
from embferry.cache.entry import Damaged, Entry, model_label
from embferry.cache.folder import FolderStore

from ..shared.counters import Counters
from ..shared.shape import Shape
from ..shared.shared_rows import SharedRows
from . import model_identity
from .channel import Publish
from .config import ConnectorConfig
from .coordinates import MAX_MULTIPLE
from .item_key import Item, item_key
from .producer import Producer
from .producer_cache import CachedEmbedding, ProducerCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

IDENTIFY_S = 30.0
"""How long the start of an engine waits until the model's files are read. Until that is done, nothing is shared."""


def open_cache(
    config: ConnectorConfig, vllm_config: VllmConfig, producer: Producer, counters: Counters, ranks: int
) -> SharedCache | None:
    """Opens the cache that the settings name, if they name one.

    Raises:
        LocalProtocolError: It cannot be used, or the model cannot be identified.
    """
    if config.cache is None:
        return None
    model_identity.check(vllm_config)
    store = address.open_store(address.parse(config.cache.url), config.cache.max_bytes, config.advertise or config.host)
    if isinstance(store, FolderStore):
        counters.add_gauge("shared_cache_bytes", lambda: store.nbytes)
    model, lora = vllm_config.model_config, vllm_config.lora_config
    return SharedCache(
        store,
        partial(model_identity.identify, vllm_config),
        producer.cache,
        counters,
        model=str(model.model),
        ranks=ranks,
        dtype=str(model.dtype).removeprefix("torch."),
        hidden=model.get_inputs_embeds_size(),
        max_embedding_bytes=config.max_embedding_bytes,
        lookup_timeout=config.cache.lookup_timeout,
        adapters_encode=lora is not None and lora.enable_tower_connector_lora,
    )


class _Lookup:
    """The search for one item of one request.

    Attributes:
        key: The item's key, once a thread has computed it.
        until: When the request goes on without it.
    """

    def __init__(self, until: float) -> None:
        self.key, self.until = "", until
        self.is_done = self.is_given_up = False

    def is_wanted(self) -> bool:
        return not self.is_given_up


class _Counts:
    """The counts of a store among those of an engine."""

    def __init__(self, counters: Counters) -> None:
        self._add = counters.add

    def hit(self) -> None:
        self._add("shared_cache_hits")

    def missed(self, reason: str) -> None:
        self._add("shared_cache_misses", label=reason)

    def wrote(self, nbytes: int) -> None:
        self._add("shared_cache_written_bytes", nbytes)

    def dropped(self, reason: str) -> None:
        self._add("shared_cache_dropped", label=reason)


class SharedCache:
    """The lookups and writes of one producer. The scheduler's thread calls the methods unless they say otherwise."""

    def __init__(
        self,
        store: Store,
        identify: Callable[[], bytes],
        cache: ProducerCache,
        counters: Counters,
        *,
        model: str,
        ranks: int,
        dtype: str,
        hidden: int,
        max_embedding_bytes: int,
        lookup_timeout: float,
        adapters_encode: bool = False,
    ) -> None:
        """Waits until the model is identified, for at most :data:`IDENTIFY_S`.

        Args:
            store: Where embeddings are. Closed with this object.
            identify: Returns the identity of the model. May block.
            cache: The producer's own cache, into which embeddings are put that were found.
            counters: Counts.
            model: The model's name, for people.
            ranks: Ranks that load embeddings.
            dtype: Name of the dtype of embeddings.
            hidden: Width of a token, or with deepstack the number that divides it.
            max_embedding_bytes: The largest embedding that is read.
            lookup_timeout: Seconds for which a request waits.
            adapters_encode: Whether an adapter (LoRA) of a request changes its embeddings.

        Raises:
            LocalProtocolError: The model cannot be identified.
        """
        self._store, self._cache = EncoderStore(store, _Counts(counters), lookup_timeout), cache
        self._model, self._ranks, self._dtype, self._hidden = model_label(model), ranks, dtype, hidden
        self._max_embedding_bytes = max_embedding_bytes
        self._adapters_encode = adapters_encode
        self._lookups: dict[tuple[str, str], _Lookup] = {}  # by request and mm_hash
        self._changed = threading.Event()
        self._identity = b""
        self._identify(identify)
        cache.on_encoded = self.keep

    def items(self, request: Request, needed: Iterable[tuple[int, MultiModalFeatureSpec]]) -> list[Item]:
        """Returns the items of a request, by index, that may be shared.

        An adapter that changes embeddings is known by a name that may stand for other weights elsewhere or later. So
        its embeddings are not shared.
        """
        if self._adapters_encode and request.lora_request is not None:
            return []
        return [
            Item(feature.identifier, feature.modality, feature.data, request.get_num_encoder_embeds(index))
            for index, feature in needed
            if feature.data is not None
        ]

    def is_searching(self, request: str, items: Iterable[Item], find: Callable[[str], object]) -> bool:
        """Returns whether the request has to wait for a lookup. Begins those of items that ``find`` does not return."""
        waiting, now = False, time.monotonic()
        for item in items:
            lookup = self._lookups.get((request, item.mm_hash))
            if lookup is None and find(item.mm_hash) is None:
                lookup = self._lookups[request, item.mm_hash] = self._begin(item, now)
            if lookup is None or lookup.is_done or lookup.is_given_up:
                continue
            if now >= lookup.until:
                lookup.is_given_up = True
                self._store.missed("late")
            else:
                waiting = True
        return waiting

    def wait(self, timeout: float) -> None:
        """Waits until a lookup has ended since the last call."""
        self._changed.wait(timeout)
        self._changed.clear()

    def key(self, request: str, mm_hash: str) -> str:
        """Returns the key under which to keep what is encoded now for this item of a request; "" to keep nothing."""
        lookup = self._lookups.get((request, mm_hash))
        return "" if lookup is None else lookup.key

    def forget(self, request: str, hashes: Iterable[str]) -> None:
        """The request has ended."""
        for mm_hash in hashes:
            if (lookup := self._lookups.pop((request, mm_hash), None)) is not None:
                lookup.is_given_up = True

    def keep(self, published: Publish, shared: SharedRows) -> None:
        """Writes what a worker has encoded, some time. Any thread; may not block."""
        if not published.content:
            return
        shape, data = shared.shape, shared.rows.reshape(-1).data
        entry = Entry(published.content, shape.layout, shape.tokens, published.digest.hex(), self._model)
        self._store.write(lambda: (entry, data), entry.nbytes)

    def close(self) -> None:
        """Writes what is queued, for a bounded time. A store that hangs stays open until the process ends."""
        self._store.close()

    def _identify(self, identify: Callable[[], bytes]) -> None:
        done, errors = threading.Event(), []

        def run() -> None:
            try:
                self._identity = identify()
            except (OSError, EmbeddingTransferError) as error:
                log.error("the shared cache is not used, because the model cannot be identified: %s", error)
                errors.append(error)
            finally:
                done.set()

        # A thread of its own: it reads the whole model, and lookups need not wait for that.
        threading.Thread(target=run, name="embferry-cache-identify", daemon=True).start()
        if not done.wait(IDENTIFY_S):
            log.warning("the model's files are still being read; until that is done, no embeddings are shared")
        elif errors:
            self.close()
            raise LocalProtocolError(f"ec_connector_extra_config: cache: {errors[0]}") from errors[0]

    def _begin(self, item: Item, now: float) -> _Lookup:
        lookup = _Lookup(now + self._store.lookup_timeout)
        if not self._identity:
            lookup.is_done = True
            self._store.missed("unidentified")
        elif not self._store.search(lambda: self._search(lookup, item)):
            lookup.is_done = True
        return lookup

    # The threads that read

    def _search(self, lookup: _Lookup, item: Item) -> None:
        try:
            lookup.key = item_key(self._identity, item)
            if not lookup.key:
                self._store.missed("unnamed")
            elif not lookup.is_given_up and self._cache.find(item.mm_hash) is None:
                self._load(lookup, item)
        finally:
            lookup.is_done = True
            self._changed.set()

    def _load(self, lookup: _Lookup, item: Item) -> None:
        made: list[SharedRows] = []

        def accept(entry: Entry) -> memoryview:
            made.append(SharedRows.make(self._checked(entry, item), self._ranks))
            return made[0].rows.reshape(-1).data

        entry = self._store.read(lookup.key, accept, lookup.is_wanted)
        if entry is not None:
            published = Publish(item.mm_hash, made[0].shape, bytes.fromhex(entry.digest), encoded=False)
            self._cache.put(CachedEmbedding(published, made[0]))
            return
        for shared in made:
            shared.close()

    def _checked(self, entry: Entry, item: Item) -> Shape:
        """Returns the shape of an entry. Raises Damaged if it is not that of the item, OSError if it is too large."""
        fields = entry.layout.fields
        shape = Shape(entry.tokens, fields[0].width, fields[0].dtype)
        multiple, rest = divmod(shape.width, self._hidden)
        if shape.layout != entry.layout or shape.dtype != self._dtype or rest or not 1 <= multiple <= MAX_MULTIPLE:
            raise Damaged(f"its layout is {entry.layout}; this model has {self._dtype}[{self._hidden}]")
        if shape.tokens != item.tokens:
            raise Damaged(f"it has {shape.tokens} tokens; the item has {item.tokens}")
        if shape.nbytes > self._max_embedding_bytes:
            raise OSError(errno.EFBIG, f"{shape.nbytes} bytes; raise max_embedding_bytes ({self._max_embedding_bytes})")
        return shape
