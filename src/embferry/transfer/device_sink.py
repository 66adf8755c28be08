"""A sink into device memory: each chunk is copied from the pool, which is the staging buffer.

Pin the pool's memory (``manager.buffers.view``) if the device copies faster from pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from embferry.protocol.commands import Deliver
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.ranges import RangeSet

from .fields import Array
from .sinks import Sink


class DeviceTarget(Protocol):
    """One field of an embedding in device memory, of its final length."""

    def copy_in(self, start: int, rows: Array) -> None:
        """Copies ``rows``, uint8 [n, bytes a token], to tokens ``[start, start + n)``.

        Returns when ``rows`` is no longer read. Called on the sink's copying thread, without locks: it may block.
        """
        ...


Targets = Mapping[str, DeviceTarget]


class DeviceSink(Sink):
    """Copies chunks into device memory on a thread of its own. Call :meth:`close` when done.

    Args:
        make: Returns the fields in device memory, given the number of tokens. Called once the length is known, on the
            manager's thread with its lock held: it must not block.
        landed: Called on the copying thread, without locks, whenever :attr:`landed_tokens` has grown.
    """

    def __init__(self, make: Callable[[int], Targets], landed: Callable[[], None] = lambda: None) -> None:
        self.targets: Targets = {}
        self._make, self._landed = make, landed
        self._ranges = RangeSet()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="embferry-landing")

    @property
    def landed_tokens(self) -> int:
        """Tokens in device memory, from token 0 on without a gap."""
        return self._ranges.prefix

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        if not self.targets:
            self.targets = self._make(total_tokens)
        copied = self._copier.submit(self._copy, chunk, self.targets)
        copied.add_done_callback(partial(self._copied, chunk, self._ranges))

    def restart(self) -> None:
        self.targets, self._ranges = {}, RangeSet()  # copies still running fill targets that are no longer used

    def close(self) -> None:
        """Waits for the last copy and ends the thread."""
        self._copier.shutdown()

    def _copy(self, chunk: Deliver, targets: Targets) -> None:
        fields = self.buffers.geometry.layout.fields
        for index, token, offset, length in self.buffers.geometry.spans(chunk.blocks, 0, chunk.length):
            rows = self.buffers.bytes(offset, length).reshape(-1, fields[index].token_bytes)
            targets[fields[index].name].copy_in(chunk.offset + token, rows)

    def _copied(self, chunk: Deliver, ranges: RangeSet, copied: Future[None]) -> None:
        caught = copied.exception()  # any error of the device ends this transfer, with its reason
        if caught is not None:
            stop = chunk.offset + chunk.length
            why = f"tokens [{chunk.offset}, {stop}) cannot be copied into device memory: {caught!r}"
            self.owner.abort(LocalProtocolError(why))
        with self.owner.lock:
            ranges.add(chunk.offset, chunk.offset + chunk.length)
        self.owner.consumed(chunk.epoch, chunk.offset)
        self._landed()
