"""A store as an encoder uses it: lookups with a time limit, and writes in the background.

Threads of its own read and write, so a request waits for a lookup no longer than ``lookup_timeout``, and never for a
write. No fault of the store is raised: it is a miss, or an embedding that is not kept.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from embferry.protocol.errors import EmbeddingTransferError
from embferry.trust.occasions import Occasions, more

from .background import Background
from .contract import Accept, Store, TooLarge
from .entry import Damaged, Entry

log = logging.getLogger(__name__)

READERS, MAX_LOOKUPS = 2, 256
MAX_WRITES, MAX_WRITE_BYTES = 256, 256 << 20
"""Embeddings that wait to be written. They hold their memory meanwhile."""
STOP_READING_S, CLOSE_S = 0.5, 5.0
"""How long the end waits for lookups, and for embeddings to be written."""


class Counts(Protocol):
    """Counts lookups and writes. Any thread may call the methods, which may not block."""

    def hit(self) -> None:
        """An embedding was found."""

    def missed(self, reason: str) -> None:
        """An embedding was not found."""

    def wrote(self, nbytes: int) -> None:
        """An embedding was written; with 0 bytes, it was there already."""

    def dropped(self, reason: str) -> None:
        """An embedding is not kept."""


class EncoderStore:
    """The lookups and writes of one encoder. Any thread may call the methods."""

    def __init__(self, store: Store, counts: Counts, lookup_timeout: float) -> None:
        """Starts the threads.

        Args:
            store: Where embeddings are. Closed with this object.
            counts: Counts.
            lookup_timeout: Seconds for which a request waits.
        """
        self.lookup_timeout = lookup_timeout
        self._store, self._counts = store, counts
        self._is_closed = False
        self._log_lock = threading.Lock()
        self._occasions = Occasions()
        self._readers = Background("embferry-cache-read", READERS, MAX_LOOKUPS, 1 << 62)
        self._writers = Background("embferry-cache-write", 1, MAX_WRITES, MAX_WRITE_BYTES)

    def search(self, job: Callable[[], object]) -> bool:
        """Runs a job on a thread that reads.

        Returns:
            False, and counts a miss, if the store hangs or many lookups wait already.
        """
        if not self._readers.is_stalled(self.lookup_timeout) and self._readers.put(job):
            return True
        self.missed("busy")
        return False

    def read(self, key: str, accept: Accept, is_wanted: Callable[[], bool]) -> Entry | None:
        """Reads an embedding, for as long as the store takes, and counts a hit or a miss.

        Args:
            key: Its key.
            accept: As for :meth:`Store.read`.
            is_wanted: Returns whether a request still waits. If none does, nothing is counted.

        Returns:
            The entry, if it was found and is wanted.
        """
        entry, reason, why = None, "absent", ""
        try:
            entry = self._store.read(key, accept)
        except Damaged as error:
            reason, why = "damaged", str(error)
        except (OSError, EmbeddingTransferError, MemoryError) as error:
            reason, why = "failed", str(error)
        if self._is_closed or not is_wanted():
            return None
        if entry is None:
            self.missed(reason, why)
        else:
            self._counts.hit()
        return entry

    def write(self, make: Callable[[], tuple[Entry, memoryview]], nbytes: int) -> None:
        """Writes an embedding, some time. Does not block.

        Args:
            make: Returns it. Runs on the thread that writes.
            nbytes: The memory that ``make`` holds.
        """
        if not self._writers.put(lambda: self._write(make), nbytes):
            self._dropped("queue_full", f"{MAX_WRITES} embeddings or {MAX_WRITE_BYTES} bytes wait to be written")

    def missed(self, reason: str, why: str = "") -> None:
        """Counts a miss. ``why`` is for the log."""
        self._counts.missed(reason)
        if why:
            self._report(reason, "an embedding could not be read from the shared cache", why)

    def close(self) -> None:
        """Writes what is queued, for at most :data:`CLOSE_S`. A store that hangs stays open until the process ends."""
        self._is_closed = True
        ended = [self._readers.close(STOP_READING_S), self._writers.close(CLOSE_S)]
        if all(ended):
            try:
                self._store.close()
            except Exception as error:
                log.error("the shared cache could not be closed", exc_info=error)

    def _write(self, make: Callable[[], tuple[Entry, memoryview]]) -> None:
        try:
            self._counts.wrote(self._store.write(*make()))
        except TooLarge as error:
            self._dropped("too_large", str(error))
        except (OSError, ValueError, MemoryError) as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._dropped("no_space" if is_full else "failed", str(error))

    def _dropped(self, reason: str, why: str) -> None:
        self._counts.dropped(reason)
        self._report(reason, "an embedding is not kept in the shared cache", why)

    def _report(self, reason: str, what: str, why: str) -> None:
        with self._log_lock:
            count = self._occasions.count(reason)
        if count is not None:
            log.warning("%s: %s%s", what, why, more(count))
