"""The loads of shared embeddings that a scheduler asks of its workers.

A load is repeated in every step until each rank has completed it, because a step may have no effect: vLLM's V1 runner
returns before any hook when a step has no tokens. With overlapping schedules a rank therefore sees a load several
times; its number tells the rank that it is the same load.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ..shared.shape import Shape
from ..shared.shared_rows import SharedRows


class PendingLoad(msgspec.Struct, frozen=True):
    """One embedding that workers are to copy into their encoder caches.

    Attributes:
        key: The scheduler's key of the memory, which the ranks have mapped.
        number: The number to write into the memory when the load is complete.
        shape: The shape of the embedding. On other hosts the memory has its bytes in another shape.
        rooms: The keys of the memory on hosts 1, 2 and so on.
        wanted: Whether the rows are still to be copied. If not, the rank only writes the number.
    """

    mm_hash: str
    key: int
    number: int
    shape: Shape
    rooms: tuple[int, ...] = ()
    wanted: bool = True


class PendingLoads:
    """The scheduler's list of loads that some rank of its host has not completed.

    Ranks on other hosts get the same steps in the same order, so they do a load that a rank here has done.
    """

    def __init__(self) -> None:
        self._loads: dict[str, tuple[SharedRows, PendingLoad]] = {}

    def add(self, mm_hash: str, shared: SharedRows, rooms: tuple[int, ...] = ()) -> None:
        """Asks every rank to load an embedding for which vLLM has reserved room. ``rooms`` name it on other hosts."""
        load = PendingLoad(mm_hash, shared.key, shared.begin_load(), shared.shape, rooms)
        self._loads[mm_hash] = (shared, load)

    def for_step(self, freed: Iterable[str]) -> tuple[PendingLoad, ...]:
        """Returns the loads for the next step. Those that vLLM has evicted must not be copied into its cache again."""
        for mm_hash in self._loads.keys() & set(freed):
            shared, load = self._loads[mm_hash]
            self._loads[mm_hash] = (shared, msgspec.structs.replace(load, wanted=False))
        self._loads = {mm_hash: pair for mm_hash, pair in self._loads.items() if pair[0].is_loading}
        return tuple(load for _, load in self._loads.values())
