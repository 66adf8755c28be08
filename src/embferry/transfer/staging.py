"""Staging: an embedding in device memory is copied to a few host buffers, chunk by chunk, and written from there.

No transport reads from device memory itself. One thread copies the next chunk while earlier ones are being written. A
buffer is free again when its write has ended; until one is free, the next chunk waits in device memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np

from embferry.protocol.chunks import chunk_tokens
from embferry.protocol.errors import Aborted, EmbeddingTransferError
from embferry.protocol.layout import Layout

from .failures import as_transfer_error, attempt
from .fields import Array, Fields

log = logging.getLogger(__name__)

Key = TypeVar("Key")

Allocate = Callable[[int], Array]
"""Makes host memory, uint8 [bytes], given the number of bytes. Pinned memory if the device copies faster with it."""


class DeviceRows(Protocol):
    """One field of an embedding in device memory: the bytes of its tokens, [tokens, bytes a token]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def copy_out(self, start: int, stop: int, into: Array) -> None:
        """Copies tokens ``[start, stop)`` to host memory, uint8 [stop - start, bytes a token].

        Returns when the copy is complete. Called on the staging thread, without locks: it may block.
        """
        ...


Source = Mapping[str, Array | DeviceRows]
"""Field name to its bytes, in host or device memory."""


def pageable(nbytes: int) -> Array:
    """Allocates ordinary, pageable memory."""
    return np.empty(nbytes, np.uint8)


@dataclass(frozen=True, slots=True)
class Staged(Generic[Key]):
    """A chunk in host memory, or the error of its copy. Give its slot to :meth:`Staging.release` after the write."""

    key: Key
    slot: int | None
    rows: Fields
    error: EmbeddingTransferError | None = None


class Staging(Generic[Key]):
    """Host buffers and the thread that fills them.

    Args:
        layout: The fields of a token.
        chunk_bytes: Size of the chunk that a buffer holds.
        slots: Number of buffers.
        wake: Called on the staging thread, without locks, when :meth:`finished` has something new. Must not block.
        allocate: Makes the buffers, each when it is first used, on the staging thread, without locks: it may block.
            What it raises is the error of that chunk.
    """

    def __init__(
        self, layout: Layout, *, chunk_bytes: int, slots: int, wake: Callable[[], None], allocate: Allocate = pageable
    ) -> None:
        self._wake = wake
        self._new_buffer = partial(_fields, layout, chunk_tokens(layout, chunk_bytes), allocate)
        self._buffers: dict[int, dict[str, Array]] = {}
        self._free = list(range(slots))
        self._waiting: deque[tuple[Key, Source, int, int]] = deque()
        self._finished: deque[Staged[Key]] = deque()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="embferry-staging")

    def submit(self, key: Key, source: Source, start: int, stop: int) -> None:
        """Copies tokens ``[start, stop)`` as soon as a buffer is free."""
        self._waiting.append((key, source, start, stop))
        self._start()

    def finished(self) -> list[Staged[Key]]:
        """Returns the chunks copied since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def release(self, slot: int) -> None:
        """Frees a buffer, which is no longer read."""
        self._free.append(slot)
        self._start()

    def close(self) -> None:
        """Ends the thread. Waiting chunks are not copied, and end with an error."""
        waiting, self._waiting = self._waiting, deque()
        self._copier.shutdown()
        for key, *_ in waiting:
            self._finish(Staged(key, None, {}, Aborted("the encode worker is shutting down", retryable=True)))

    def _start(self) -> None:
        while self._waiting and self._free:
            self._copy(self._free.pop(), *self._waiting.popleft())

    def _copy(self, slot: int, key: Key, source: Source, start: int, stop: int) -> None:
        error = attempt(self._copier.submit, self._run, slot, key, source, start, stop)
        if error is not None:  # no thread can be started, or the manager is closing
            self._finish(Staged(key, slot, {}, as_transfer_error("the staging thread", error)))
            del error  # its traceback refers to this frame, and so to the embedding

    def _run(self, slot: int, key: Key, source: Source, start: int, stop: int) -> None:
        """Copies a chunk, on the staging thread. Any error of the device ends this transfer, with its reason."""
        error = attempt(self._fill, slot, source, start, stop)
        if error is None:
            rows = {name: buffer[: stop - start] for name, buffer in self._buffers[slot].items()}
            self._finish(Staged(key, slot, rows))
            return
        log.error("tokens [%d, %d) cannot be copied out of device memory", start, stop, exc_info=error)
        what = f"the copy of tokens [{start}, {stop}) out of device memory"
        self._finish(Staged(key, slot, {}, as_transfer_error(what, error)))
        del error  # its traceback refers to this frame, and so to the embedding

    def _fill(self, slot: int, source: Source, start: int, stop: int) -> None:
        if slot not in self._buffers:
            self._buffers[slot] = self._new_buffer()
        for name, buffer in self._buffers[slot].items():
            field, into = source[name], buffer[: stop - start]
            if isinstance(field, np.ndarray):
                into[:] = field[start:stop]
            else:
                field.copy_out(start, stop, into)

    def _finish(self, staged: Staged[Key]) -> None:
        self._finished.append(staged)
        self._wake()


def _fields(layout: Layout, tokens: int, allocate: Allocate) -> dict[str, Array]:
    return {f.name: allocate(tokens * f.token_bytes).reshape(tokens, f.token_bytes) for f in layout.fields}
