"""What workers are to put into their encoder caches: said again in every step until each rank has marked it.

A step may come to nothing (vLLM's V1 runner returns before any hook when no token is scheduled), and what is asked in
one step is done in a later one when schedules overlap. So a load is repeated, and done once: its number tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from .shared import Place, SharedRows


class Load(msgspec.Struct, frozen=True):
    """``wanted``: whether the rows are still to be copied, or only to be marked."""

    mm_hash: str
    place: Place
    dtype: str
    width: int
    number: int
    wanted: bool = True


@dataclass(slots=True)
class _Open:
    shared: SharedRows
    load: Load


class Loads:
    """The scheduler's list."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def ask(self, mm_hash: str, shared: SharedRows, dtype: str, width: int) -> None:
        """vLLM has made room for it."""
        self._open[mm_hash] = _Open(shared, Load(mm_hash, shared.place, dtype, width, shared.lend()))

    def step(self, freed: Iterable[str]) -> tuple[Load, ...]:
        """For the next step. ``freed``: what vLLM has given up, and must not come back."""
        for mm_hash in self._open.keys() & set(freed):
            entry = self._open[mm_hash]
            entry.load = msgspec.structs.replace(entry.load, wanted=False)
        for mm_hash in [mm_hash for mm_hash, entry in self._open.items() if not entry.shared.is_lent]:
            del self._open[mm_hash]
        return tuple(entry.load for entry in self._open.values())
