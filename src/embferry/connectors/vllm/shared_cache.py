"""The cache that encoders share, as a producer uses it: looks items up before vLLM encodes them, keeps what it encoded.

Threads of its own read and write. A request waits for a lookup no longer than ``lookup_timeout``, and never for a
write. After a failure of either, an item is encoded.
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
from embferry.cache.background import Background
from embferry.cache.contract import Store, TooLarge
from embferry.cache.entry import MAX_MODEL, Damaged, Entry
from embferry.cache.folder import FolderStore
from embferry.transfer.failures import attempt
from embferry.trust.occasions import Occasions, more

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

READERS, MAX_LOOKUPS = 2, 256
MAX_WRITES, MAX_WRITE_BYTES = 256, 256 << 20
"""Embeddings that wait to be written. They hold their memory meanwhile."""
IDENTIFY_S = 30.0
"""How long the start of an engine waits until the model's files are read. Until that is done, nothing is shared."""
CLOSE_S = 5.0
"""How long the end of an engine waits for embeddings to be written."""


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
        model=model_identity.model_name(vllm_config),
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
        self._store, self._cache, self._counters = store, cache, counters
        self._model, self._ranks, self._dtype, self._hidden = model[:MAX_MODEL], ranks, dtype, hidden
        self._max_embedding_bytes, self._lookup_timeout = max_embedding_bytes, lookup_timeout
        self._adapters_encode = adapters_encode
        self._lookups: dict[tuple[str, str], _Lookup] = {}  # by request and mm_hash
        self._changed = threading.Event()
        self._is_closed = False
        self._log_lock = threading.Lock()
        self._occasions = Occasions()
        self._readers = Background("embferry-cache-read", READERS, MAX_LOOKUPS, 1 << 62)
        self._writers = Background("embferry-cache-write", 1, MAX_WRITES, MAX_WRITE_BYTES)
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
                self._missed("late")
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
        if not self._writers.put(lambda: self._write(entry, data), entry.nbytes):
            self._dropped("queue_full", f"{MAX_WRITES} embeddings or {MAX_WRITE_BYTES} bytes wait to be written")

    def close(self) -> None:
        """Writes what is queued, for at most :data:`CLOSE_S`. A store that hangs stays open until the process ends."""
        self._is_closed = True
        ended = [self._readers.close(0.5), self._writers.close(CLOSE_S)]
        if all(ended) and (error := attempt(self._store.close)) is not None:
            log.error("the shared cache could not be closed", exc_info=error)

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
        lookup = _Lookup(now + self._lookup_timeout)
        if not self._identity:
            lookup.is_done = True
            self._missed("unidentified")
        elif self._is_busy(lambda: self._search(lookup, item)):
            lookup.is_done = True
            self._missed("busy")
        return lookup

    def _is_busy(self, search: Callable[[], object]) -> bool:
        """Begins a search, unless the store hangs or many searches wait already."""
        return self._readers.is_stalled(self._lookup_timeout) or not self._readers.put(search)

    # The threads that read

    def _search(self, lookup: _Lookup, item: Item) -> None:
        try:
            lookup.key = item_key(self._identity, item)
            if not lookup.key:
                self._missed("unnamed")
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

        entry, missed, why = None, "absent", ""
        try:
            entry = self._store.read(lookup.key, accept)
        except Damaged as error:
            missed, why = "damaged", str(error)
        except (OSError, EmbeddingTransferError, MemoryError) as error:
            missed, why = "failed", str(error)
        if entry is not None and not (self._is_closed or lookup.is_given_up):
            published = Publish(item.mm_hash, made[0].shape, bytes.fromhex(entry.digest), encoded=False)
            self._cache.put(CachedEmbedding(published, made[0]))
            self._counters.add("shared_cache_hits")
            return
        for shared in made:
            shared.close()
        if not lookup.is_given_up:  # that was counted
            self._missed(missed, why)

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

    # The thread that writes

    def _write(self, entry: Entry, data: memoryview) -> None:
        try:
            self._counters.add("shared_cache_written_bytes", self._store.write(entry, data))
        except TooLarge as error:
            self._dropped("too_large", str(error))
        except (OSError, ValueError) as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._dropped("no_space" if is_full else "failed", str(error))

    def _missed(self, reason: str, why: str = "") -> None:
        self._counters.add("shared_cache_misses", label=reason)
        if why:
            self._report(reason, "an embedding could not be read from the shared cache", why)

    def _dropped(self, reason: str, why: str) -> None:
        self._counters.add("shared_cache_dropped", label=reason)
        self._report(reason, "an embedding is not kept in the shared cache", why)

    def _report(self, reason: str, what: str, why: str) -> None:
        with self._log_lock:
            count = self._occasions.count(reason)
        if count is not None:
            log.warning("%s: %s%s", what, why, more(count))
