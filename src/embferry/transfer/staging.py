"""From device memory to the transport: chunk by chunk through a few host buffers, of bounded size, made once.

No transport here reads from device memory itself (``Capabilities.device_memory``), so an embedding that lies there is
copied out a chunk at a time, by one thread, while chunks before it are on their way. A buffer is free again when its
write is over, and until one is free the next chunk waits where it is.
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
"""Makes so many bytes of host memory, uint8 [bytes]: pinned, for a device that copies faster from and to such."""


class DeviceRows(Protocol):
    """One field of an embedding in device memory: the bytes of its tokens, [tokens, bytes a token]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def copy_out(self, start: int, stop: int, into: Array) -> None:
        """Copies tokens ``[start, stop)`` to host memory, uint8 [stop - start, bytes a token]; returns when they are
        there. Called by one thread that has nothing else to do."""
        ...


Source = Mapping[str, Array | DeviceRows]
"""Field name to where its bytes are."""


def pageable(nbytes: int) -> Array:
    """Ordinary memory."""
    return np.empty(nbytes, np.uint8)


@dataclass(frozen=True, slots=True)
class Staged(Generic[Key]):
    """A chunk in host memory, or why it is not; :meth:`Staging.release` it when nobody reads it any more."""

    key: Key
    slot: int
    rows: Fields
    error: LocalProtocolError | None = None


class Staging(Generic[Key]):
    """:param slots: buffers; each holds a chunk of about ``chunk_bytes``.
    :param wake: called, from any thread, when :meth:`finished` has something new.
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
        """Copies tokens ``[start, stop)`` out as soon as a buffer is free."""
        self._waiting.append((key, source, start, stop))
        self._start()

    def finished(self) -> list[Staged[Key]]:
        """What has been copied since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def release(self, slot: int) -> None:
        """The buffer may be written into again."""
        self._free.append(slot)
        self._start()

    def close(self) -> None:
        """Ends the thread. What waits is not copied any more."""
        self._waiting.clear()
        self._copier.shutdown()

    def _start(self) -> None:
        while self._waiting and self._free:
            self._copy(self._free.pop(), *self._waiting.popleft())

    def _copy(self, slot: int, key: Key, source: Source, start: int, stop: int) -> None:
        rows = {name: buffer[: stop - start] for name, buffer in self._buffers[slot].items()}

        def over(copied: Future[None]) -> None:
            caught = copied.exception()  # the device's own, of whatever kind: it ends this transfer, with its reason
            why = f"tokens [{start}, {stop}) cannot be copied out of device memory: {caught!r}"
            self._finished.append(Staged(key, slot, rows, LocalProtocolError(why) if caught else None))
            self._wake()

        self._copier.submit(_copy_out, source, start, stop, rows).add_done_callback(over)


def _copy_out(source: Source, start: int, stop: int, rows: Fields) -> None:
    for name, into in rows.items():
        field = source[name]
        if isinstance(field, np.ndarray):
            into[:] = field[start:stop]
        else:
            field.copy_out(start, stop, into)


def _fields(layout: Layout, tokens: int, allocate: Allocate) -> dict[str, Array]:
    return {f.name: allocate(tokens * f.token_bytes).reshape(tokens, f.token_bytes) for f in layout.fields}
