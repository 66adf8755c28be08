"""Work and memory of a run, counted in a way that gives the same result on every machine.

Work is the number of calls of Python functions and of C functions from Python. Memory is the peak of what Python's
allocators hand out during the run; a library that allocates otherwise is not seen. A count above the bound is taken
again: the first run may fill a cache or import a module.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that an input of ``n`` bytes may take: ``calls + calls_per_byte * n`` calls, and so for memory."""

    calls: int = 3000
    calls_per_byte: float = 4.0
    memory: int = 64 << 10
    memory_per_byte: float = 64.0


class ExcessError(AssertionError):
    """An input takes more than its size explains."""


def excess_of_calls(run: Callable[[], object], pieces: list[bytes], bounds: Bounds) -> ExcessError | None:
    """Returns an error if ``run`` makes more calls than the bounds allow."""
    most = bounds.calls + bounds.calls_per_byte * sum(map(len, pieces))
    calls = count_calls(run)
    if calls <= most or (calls := count_calls(run)) <= most:
        return None
    return ExcessError(f"{calls} calls for {sum(map(len, pieces))} bytes; at most {most:.0f} are in proportion")


def excess_of_memory(run: Callable[[], object], pieces: list[bytes], bounds: Bounds) -> ExcessError | None:
    """Returns an error if ``run`` holds more memory at once than the bounds allow."""
    most = bounds.memory + bounds.memory_per_byte * sum(map(len, pieces))
    peak = peak_memory(run)
    if peak <= most or (peak := peak_memory(run)) <= most:
        return None
    return ExcessError(f"{peak} bytes of memory for {sum(map(len, pieces))} bytes; {most:.0f} are in proportion")


def count_calls(run: Callable[[], object]) -> int:
    """Returns the calls that ``run`` makes on this thread."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def peak_memory(run: Callable[[], object]) -> int:
    """Returns the most bytes that ``run`` holds at once."""
    tracemalloc.start(1)
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
