"""The blocks of the receive pool: which request holds which block, and which blocks a late write may still reach.

Every block is in exactly one of three states: free, held by a request, or quarantined for one. A block that was granted
to a writer becomes free only when the writer is known to be done with it. Until then it is quarantined, so that a late
one-sided write never reaches a block that belongs to another request by then.

Blocks of one allocation need not be adjacent. Adjacent ones are preferred, because they make one range. Free blocks are
kept as maximal runs, grouped by the power of two of their length (one level of the two-level scheme of TLSF, Masmano et
al. 2004), so the cost of an allocation does not depend on the size of the pool.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError, shown
from embferry.protocol.layout import merged

__all__ = ["MetadataAllocation", "ReqToMetadataBlockAllocator", "blocks_needed"]


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Returns the number of blocks that ``num_tokens`` tokens occupy. The last may be partly filled."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class MetadataAllocation:
    """The blocks of one allocation, in the order in which tokens fill them."""

    blocks: tuple[int, ...]
    block_size: int

    @property
    def allocated_tokens(self) -> int:
        """Number of tokens that fit: the number of blocks times the block size."""
        return len(self.blocks) * self.block_size

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """``(first block, count)`` of each run of adjacent blocks."""
        return tuple(merged(self.blocks))

    @property
    def adjacent(self) -> bool:
        """Whether the blocks are one run, so that tokens can be used in place."""
        return len(self.runs) == 1


class ReqToMetadataBlockAllocator:
    """Allocates blocks to requests. Not thread-safe: one driver owns the pool.

    Calls that name blocks are atomic: if one block is not in the required state (freed twice, held by another request,
    outside the pool), they raise LocalProtocolError and change nothing.

    Args:
        num_blocks: Number of blocks in the pool.
        block_size: Tokens of a block.

    Raises:
        LocalProtocolError: A number is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise LocalProtocolError(
                f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing; use at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = _FreeRuns(num_blocks)
        self._held: dict[int, Hashable] = {}
        self._quarantined: dict[int, Hashable] = {}

    @property
    def available(self) -> int:
        """Number of free blocks."""
        return self._free.blocks

    @property
    def used(self) -> int:
        """Number of blocks held by requests, without the quarantined ones."""
        return len(self._held)

    @property
    def quarantined(self) -> int:
        return len(self._quarantined)

    def alloc(self, num_tokens: int, req_id: Hashable) -> MetadataAllocation | None:
        """Allocates blocks for ``num_tokens`` tokens to a request, known by any hashable ``req_id``.

        Returns:
            The blocks, or None if fewer are free: an allocation is never partial.
        """
        return self.alloc_blocks(blocks_needed(num_tokens, self.block_size), req_id)

    def alloc_blocks(self, count: int, req_id: Hashable) -> MetadataAllocation | None:
        """Allocates ``count`` blocks, adjacent ones if such a run is free. Returns None if fewer are free."""
        if count < 1:
            raise LocalProtocolError(f"request {req_id!r} asked for {count} blocks; ask for at least one token")
        if count > self._free.blocks:
            return None
        blocks = self._free.take(count)
        self._held.update(dict.fromkeys(blocks, req_id))
        return MetadataAllocation(tuple(blocks), self.block_size)

    def free(self, blocks: Iterable[int], req_id: Hashable) -> None:
        """Frees held blocks. Their writer must be known to be done with them."""
        self._free.put(self._remove(self._held, blocks, req_id, "held"))

    def quarantine(self, blocks: Iterable[int], req_id: Hashable) -> None:
        """Quarantines held blocks until :meth:`release_quarantined`: a late write may still reach them."""
        self._quarantined.update(dict.fromkeys(self._remove(self._held, blocks, req_id, "held"), req_id))

    def release_quarantined(self, blocks: Iterable[int], req_id: Hashable) -> None:
        """Frees quarantined blocks: their writer has drained, or its access has been revoked."""
        self._free.put(self._remove(self._quarantined, blocks, req_id, "quarantined"))

    def is_quarantined(self, block: int) -> bool:
        return block in self._quarantined

    def check_held(self, allocation: MetadataAllocation, req_id: Hashable) -> None:
        """Checks that a request holds an allocation of this pool.

        Raises:
            LocalProtocolError: It is no allocation, has other blocks, or blocks of another size.
        """
        if not isinstance(allocation, MetadataAllocation):
            raise LocalProtocolError(f"{shown(allocation, 80)} is no MetadataAllocation; take one from the allocator")
        if allocation.block_size != self.block_size or not allocation.blocks:
            raise LocalProtocolError(
                f"an allocation of {len(allocation.blocks)} blocks of {allocation.block_size} tokens; the blocks of "
                f"this pool have {self.block_size}"
            )
        self._check(self._held, allocation.blocks, req_id, "held")

    def holders(self) -> dict[Hashable, tuple[int, ...]]:
        """Returns the blocks of each request, held and quarantined, ascending."""
        found: dict[Hashable, list[int]] = {}
        for place in (self._held, self._quarantined):
            for block, req_id in place.items():
                found.setdefault(req_id, []).append(block)
        return {req_id: tuple(sorted(blocks)) for req_id, blocks in found.items()}

    def check_integrity(self) -> None:
        """Checks that every block is in exactly one state. Walks over the whole pool.

        Raises:
            LocalProtocolError: A block is in none or in several.
        """
        self._free.check_integrity()
        everywhere = [block for first, count in self._free for block in range(first, first + count)]
        everywhere += [*self._held, *self._quarantined]
        if sorted(everywhere) != list(range(self.num_blocks)):
            raise LocalProtocolError(
                f"of {self.num_blocks} blocks {self.available} are free, {self.used} held, {self.quarantined} "
                "quarantined: a block is missing or counted twice; report this as a bug"
            )

    @classmethod
    def _remove(cls, place: dict[int, Hashable], blocks: Iterable[int], req_id: Hashable, name: str) -> list[int]:
        """Removes ``blocks`` from ``place``, all or none."""
        ascending = cls._check(place, blocks, req_id, name)
        for block in ascending:
            del place[block]
        return ascending

    @staticmethod
    def _check(place: dict[int, Hashable], blocks: Iterable[int], req_id: Hashable, name: str) -> list[int]:
        """Returns ``blocks`` in ascending order if all of them are in ``place`` for a request."""
        ascending = sorted(blocks)
        for before, block in zip([None, *ascending], ascending, strict=False):
            if block == before or block not in place or place[block] != req_id:
                raise LocalProtocolError(f"block {block} is not {name} by request {req_id!r}, or is named twice")
        return ascending


class _FreeRuns:
    """Maximal runs of free blocks. ``_filed[k]`` maps first to length for the runs of 2**k to 2**(k+1) - 1 blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = 0
        self._filed: list[dict[int, int]] = [{} for _ in range(num_blocks.bit_length())]
        self._length: dict[int, int] = {}  # by the first block
        self._first: dict[int, int] = {}  # by the block after the last
        self._add(0, num_blocks)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._length.items())

    def take(self, count: int) -> list[int]:
        """Takes ``count`` free blocks: from one run if possible, otherwise from the longest runs."""
        taken: list[int] = []
        while len(taken) < count:
            missing = count - len(taken)
            first, length = self._choose(missing)
            self._drop(first, length)
            used = min(missing, length)
            taken += range(first, first + used)
            if used < length:
                self._add(first + used, length - used)
        return taken

    def put(self, ascending: list[int]) -> None:
        for run_first, run_count in merged(tuple(ascending)):
            first, count = run_first, run_count
            left = self._first.get(first)
            if left is not None:
                count += first - left
                first = left
                self._drop(left, self._length[left])
            right = self._length.get(run_first + run_count)
            if right is not None:
                self._drop(run_first + run_count, right)
                count += right
            self._add(first, count)

    def check_integrity(self) -> None:
        filed = {first: length for runs in self._filed for first, length in runs.items()}
        ends = {first + length: first for first, length in filed.items()}
        if (filed, ends, sum(filed.values())) != (self._length, self._first, self.blocks) or filed.keys() & ends.keys():
            raise LocalProtocolError("the free runs are filed inconsistently or not merged; report this as a bug")

    def _choose(self, count: int) -> tuple[int, int]:
        """Returns a run that holds ``count`` blocks if one is found at constant cost, otherwise one of the longest.

        Of the class of ``count`` itself only the last run is tried; every run of a higher class fits.
        """
        own = count.bit_length() - 1
        if own < len(self._filed) and self._filed[own]:
            first, length = self._last(own)
            if length >= count:
                return first, length
        for size_class in (*range(own + 1, len(self._filed)), *range(own, -1, -1)):
            if self._filed[size_class]:
                return self._last(size_class)
        raise LocalProtocolError(f"{count} blocks were taken from an empty pool; report this as a bug")

    def _last(self, size_class: int) -> tuple[int, int]:
        # popitem, then put back: unlike next(reversed(...)) it never walks over the entries deleted before.
        runs = self._filed[size_class]
        first, length = runs.popitem()
        runs[first] = length
        return first, length

    def _add(self, first: int, length: int) -> None:
        self._filed[length.bit_length() - 1][first] = length
        self._length[first] = length
        self._first[first + length] = first
        self.blocks += length

    def _drop(self, first: int, length: int) -> None:
        del self._filed[length.bit_length() - 1][first]
        del self._length[first]
        del self._first[first + length]
        self.blocks -= length
