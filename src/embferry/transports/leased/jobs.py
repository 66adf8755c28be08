"""Writes, how they are cut into requests for an engine, and the source memory that is registered for them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from embferry.protocol.errors import TransportError

from ..contract import Piece

Run = tuple[int, int, int]
"""Contiguous bytes: address of the source, offset in the region (of the peer), length."""


class WriteJob:
    """One write and how far it is.

    The engine's thread changes all of it but ``base``, ``go`` and ``stop``, which other threads set.

    Args:
        find_runs: Computes the runs of the write; called once, on the engine's thread.
        keeps: Keeps the source memory alive.

    Attributes:
        base: Address of the peer's region; to be set before ``go``.
        go: The receiver's verdict; None until it has come.
        stop: The error with which the write ends if part of it has not begun; None: it may begin.
        source: The memory that is read, ``(address, length)``, ascending and disjoint.
        registered: The source is registered with the engine.
        exhausted: No further request of it will be started.
        in_flight: Requests that have begun and are not over.
        error: Why bytes of the write are not in the region; None: nothing has failed.
        clean: False if bytes of a failed request may still be in flight.
    """

    def __init__(self, find_runs: Callable[[], list[Run]], keeps: object = None) -> None:
        self._find_runs, self._keeps = find_runs, keeps
        self._parts: Iterator[list[Run]] | None = None
        self._next: list[Run] | None = None
        self.base = self.in_flight = 0
        self.go: bool | None = None
        self.stop: TransportError | None = None
        self.error: TransportError | None = None
        self.registered = self.exhausted = False
        self.clean = True

    @cached_property
    def runs(self) -> list[Run]:
        return self._find_runs()

    @cached_property
    def source(self) -> list[tuple[int, int]]:
        return merged_source(self.runs)

    def next_part(self, slice_bytes: int, max_runs: int) -> list[Run] | None:
        """Returns the next request, with absolute addresses on both sides; None if the write has no bytes.

        The job is exhausted with the last.
        """
        if self._parts is None:
            self._parts = parts(self.runs, self.base, slice_bytes, max_runs)
            self._next = next(self._parts, None)
        part, self._next = self._next, next(self._parts, None)
        self.exhausted = self._next is None
        return part


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def merged_runs(pieces: Sequence[Piece]) -> list[Run]:
    """Returns the runs of the pieces that have bytes; neighbours on both sides become one."""
    runs: list[Run] = []
    for piece in pieces:
        if length := piece.source.nbytes:
            address, offset = address_of(piece.source), piece.offset
            before, at, size = runs[-1] if runs else (0, 0, 0)
            if size and (before + size, at + size) == (address, offset):
                runs[-1] = (before, at, size + length)
            else:
                runs.append((address, offset, length))
    return runs


def merged_source(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Returns ``(address, length)`` of the source memory, ascending and disjoint."""
    ranges: list[tuple[int, int]] = []
    for address, _, length in sorted(runs):
        if ranges and address <= sum(ranges[-1]):
            start, size = ranges.pop()
            address, length = start, max(size, address + length - start)
        ranges.append((address, length))
    return ranges


def parts(runs: Sequence[Run], base: int, slice_bytes: int, max_runs: int) -> Iterator[list[Run]]:
    """Yields requests of at most ``slice_bytes`` and ``max_runs``, which together are the runs at ``base``."""
    chosen: list[Run] = []
    room = slice_bytes
    for address, offset, length in runs:
        done = 0
        while done < length:
            size = min(length - done, room)
            chosen.append((address + done, base + offset + done, size))
            done += size
            room -= size
            if room == 0 or len(chosen) == max_runs:
                yield chosen
                chosen, room = [], slice_bytes
    if chosen:
        yield chosen


@dataclass(slots=True)
class _Entry:
    length: int
    registered: Any
    users: int


class Sources:
    """Registrations, counted by the writes that use them.

    Registered ranges never overlap: Mooncake refuses that, and NIXL does not find memory behind a range that lies
    inside another.

    Args:
        register: Registers an address and a length with the engine; returns what ``deregister`` takes.
    """

    def __init__(self, register: Callable[[int, int], Any], deregister: Callable[[Any], None]) -> None:
        self._register, self._deregister = register, deregister
        self._starts: list[int] = []
        self._entries: dict[int, _Entry] = {}

    def acquire(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Registers what is not yet registered of disjoint ranges, each an address and a length.

        Returns:
            False, with nothing done, while a range overlaps a registered one without being the same.

        Raises:
            TransportError: The engine does not take the memory. Nothing stays acquired.
        """
        if any(self._overlaps(start, length) for start, length in ranges):
            return False
        acquired: list[tuple[int, int]] = []
        try:
            for start, length in ranges:
                if start not in self._entries:
                    # One by one, because a list is deregistered only as it was registered.
                    self._entries[start] = _Entry(length, self._register(start, length), 0)
                    insort(self._starts, start)
                self._entries[start].users += 1
                acquired.append((start, length))
        except BaseException:
            self.release(acquired)
            raise
        return True

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        for start, _ in ranges:
            entry = self._entries[start]
            entry.users -= 1
            if entry.users == 0:
                del self._entries[start]
                self._starts.remove(start)
                self._deregister(entry.registered)

    def _overlaps(self, start: int, length: int) -> bool:
        """Returns whether a registered range overlaps this one and is another."""
        at = bisect_right(self._starts, start)
        near = [(other, self._entries[other].length) for other in self._starts[max(0, at - 1) : at + 1]]
        return any(
            other < start + length and start < other + size and (other, size) != (start, length) for other, size in near
        )
