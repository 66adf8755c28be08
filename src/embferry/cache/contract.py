"""The interface of a store of embeddings, and what a reader of one passes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .entry import Damaged, Entry, digest_of

Accept = Callable[[Entry], memoryview]
"""Returns memory for the bytes of an entry, uint8 [nbytes], contiguous and writable. Raises Damaged if the entry cannot
be the one that was asked for; what else it raises is no fault of the entry."""


class Store(Protocol):
    """Keeps embeddings by key. Any thread may call the methods, which block for as long as the store takes."""

    def read(self, key: str, accept: Accept) -> Entry | None:
        """Reads an embedding into the memory that ``accept`` returns, and verifies its digest.

        Returns:
            The entry, or None if the store does not have it.

        Raises:
            Damaged: What the store had is not that embedding. It is removed, if the store allows that.
            OSError: The store cannot be used now.
        """

    def write(self, entry: Entry, data: memoryview) -> int:
        """Keeps an embedding: all of it, or nothing.

        Args:
            entry: What it is.
            data: uint8 [nbytes]

        Returns:
            The bytes written; 0 if the store has it already.

        Raises:
            TooLarge: It is larger than the store.
            OSError: The store cannot be used now, or is full.
        """

    def close(self) -> None:
        """Ends the use of the store. Idempotent."""


class TooLarge(Exception):  # noqa: N818  (it says what the embedding is)
    """An embedding exceeds what a store may hold."""


def verify(entry: Entry, data: memoryview) -> None:
    """Raises Damaged unless ``data`` has the entry's digest."""
    if digest_of(entry.layout, entry.tokens, lambda at, end: (data[at:end],)) != entry.digest:
        raise Damaged("its bytes do not have the digest in its head")
