"""A sink into device memory: each chunk is copied from the pool, which is the staging buffer.

Pin the pool's memory (``manager.buffers.view``) if the device copies faster from pinned memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import LocalProtocolError, shown
from embferry.protocol.ranges import RangeSet

from .failures import attempt
from .fields import Array
from .sinks import Sink

log = logging.getLogger(__name__)


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

    The transfer has succeeded once the last copy has. If a copy fails, the transfer fails with its reason.

    Args:
        make: Returns the fields in device memory, given the number of tokens. Called when the first chunk has arrived,
            on the manager's callback thread, with the lock of this sink held: it may block.
        copied: Called on the copying thread, without locks, whenever :attr:`copied_tokens` has grown. If it raises, the
            transfer fails.
    """

    def __init__(self, make: Callable[[int], Targets], copied: Callable[[], None] = lambda: None) -> None:
        self.targets: Targets = {}
        self._make, self._copied = make, copied
        self._ranges = RangeSet()
        self._copying = 0  # delivered chunks that are not copied yet
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="embferry-device-sink")

    @property
    def copied_tokens(self) -> int:
        """Tokens in device memory, from token 0 on without a gap."""
        return self._ranges.prefix

    @property
    def is_complete(self) -> bool:
        return self._copying == 0

    def needs_preparation(self, chunk: Verify) -> bool:
        return not self.targets

    def prepare(self, chunk: Verify, total_tokens: int) -> None:
        targets = self._make(total_tokens)
        missing = [f.name for f in self.buffers.geometry.layout.fields if f.name not in targets]
        if missing:
            raise LocalProtocolError(f"make() returned no target for {', '.join(missing)}")
        self.targets = targets

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        self._copying += 1
        try:
            self._copier.submit(self._copy, chunk, self.targets, self._ranges)
        except BaseException:
            self._copying -= 1
            raise

    def restart(self) -> None:
        self.targets, self._ranges = {}, RangeSet()  # copies still running fill targets that are no longer used

    def close(self) -> None:
        """Waits for the last copy and ends the thread."""
        self._copier.shutdown()

    def _copy(self, chunk: Deliver, targets: Targets, ranges: RangeSet) -> None:
        """Copies a chunk, on the copying thread. Any error of the device ends this transfer, with its reason."""
        stop = chunk.offset + chunk.length
        if (error := attempt(self._land, chunk, targets, ranges)) is not None:
            why = f"tokens [{chunk.offset}, {stop}) were not copied into device memory: {shown(error)}"
            log.error(why, exc_info=error)
            self.owner.abort(LocalProtocolError(why))
        with self.owner.lock:
            self._copying -= 1
        self.owner.consumed(chunk.epoch, chunk.offset)
        self.owner.copied()

    def _land(self, chunk: Deliver, targets: Targets, ranges: RangeSet) -> None:
        fields = self.buffers.geometry.layout.fields
        for index, token, offset, length in self.buffers.geometry.spans(chunk.blocks, 0, chunk.length):
            rows = self.buffers.bytes(offset, length).reshape(-1, fields[index].token_bytes)
            targets[fields[index].name].copy_in(chunk.offset + token, rows)
        with self.owner.lock:
            ranges.add(chunk.offset, chunk.offset + chunk.length)
        self._copied()
