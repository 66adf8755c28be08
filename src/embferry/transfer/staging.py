"""Staging: an embedding in device memory is copied to a few host buffers, chunk by chunk, and written from there.

No transport here reads from device memory itself (``Capabilities.device_memory``). One thread copies the next chunk
while earlier ones are being written. A buffer is free again when its write has ended; until one is free, the next chunk
waits in device memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from embferry.protocol.chunks import chunk_tokens
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Layout

from .fields import Array, Fields

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
    slot: int
    rows: Fields
    error: LocalProtocolError | None = None


class Staging(Generic[Key]):
    """Host buffers and the thread that fills them.

    Args:
        layout: The fields of a token.
        chunk_bytes: Size of the chunk that a buffer holds.
        slots: Number of buffers.
        wake: Called on the staging thread, without locks, when :meth:`finished` has something new. Must not block.
        allocate: Makes the buffers.
    """

    def __init__(
        self, layout: Layout, *, chunk_bytes: int, slots: int, wake: Callable[[], None], allocate: Allocate = pageable
    ) -> None:
        self._wake = wake
        self._buffers = [_fields(layout, chunk_tokens(layout, chunk_bytes), allocate) for _ in range(slots)]
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
        """Ends the thread. Waiting chunks are not copied."""
        self._waiting.clear()
        self._copier.shutdown()

    def _start(self) -> None:
        while self._waiting and self._free:
            self._copy(self._free.pop(), *self._waiting.popleft())

    def _copy(self, slot: int, key: Key, source: Source, start: int, stop: int) -> None:
        rows = {name: buffer[: stop - start] for name, buffer in self._buffers[slot].items()}

        def copied_out(copied: Future[None]) -> None:
            caught = copied.exception()  # any error of the device ends this transfer, with its reason
            why = f"tokens [{start}, {stop}) cannot be copied out of device memory: {caught!r}"
            self._finished.append(Staged(key, slot, rows, LocalProtocolError(why) if caught else None))
            self._wake()

        self._copier.submit(_copy_out, source, start, stop, rows).add_done_callback(copied_out)


def _copy_out(source: Source, start: int, stop: int, rows: Fields) -> None:
    for name, into in rows.items():
        field = source[name]
        if isinstance(field, np.ndarray):
            into[:] = field[start:stop]
        else:
            field.copy_out(start, stop, into)


def _fields(layout: Layout, tokens: int, allocate: Allocate) -> dict[str, Array]:
    return {f.name: allocate(tokens * f.token_bytes).reshape(tokens, f.token_bytes) for f in layout.fields}
