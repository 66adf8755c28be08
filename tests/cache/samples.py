"""Embeddings for the tests, and files that hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from embferry.cache.contract import Store
from embferry.cache.entry import Entry, digest_of
from embferry.cache.folder import SUFFIX, FolderStore
from embferry.protocol.layout import Field, Layout

LAYOUT = Layout((Field("input_embeddings", "float32", 8), Field("fill_ids", "int32", 1)))
ROOMY = 1 << 30


def key_of(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def sample(name: object, tokens: int = 16, layout: Layout = LAYOUT, seed: int = 0) -> tuple[Entry, memoryview]:
    """Returns an embedding of noise."""
    rng = np.random.default_rng([seed, int(key_of(name)[:8], 16)])
    data = memoryview(rng.integers(0, 255, tokens * layout.token_bytes, dtype=np.uint8).tobytes())
    digest = digest_of(layout, tokens, lambda at, end: (data[at:end],))
    return Entry(key_of(name), layout, tokens, digest, "a model"), data


def keep(store: Store, name: object, tokens: int = 16) -> int:
    entry, data = sample(name, tokens)
    return store.write(entry, data)


def found(store: Store, name: object) -> bytes | None:
    """Returns the bytes of an embedding in the store."""
    room = bytearray()

    def accept(entry: Entry) -> memoryview:
        room.extend(bytes(entry.nbytes))
        return memoryview(room)

    return None if store.read(key_of(name), accept) is None else bytes(room)


def has(store: Store, name: object, tokens: int = 16) -> bool:
    """Returns whether the store has an embedding, which is then the right one."""
    data = found(store, name)
    assert data is None or data == bytes(sample(name, tokens)[1])
    return data is not None


def path_of(folder: Path, name: object) -> Path:
    return folder / (key_of(name) + SUFFIX)


def file_bytes(name: object, tokens: int = 16) -> int:
    entry, data = sample(name, tokens)
    return len(entry.head()) + len(data)


def opened(folder: Path, max_bytes: int = ROOMY, **options: int) -> FolderStore:
    return FolderStore(folder / "cache", max_bytes, **options)
