"""Where the data goes on arrival: gathered, used in place, or handed on chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from embferry.memory.blocks import blocks_needed
from embferry.memory.buffers import MultimodalDataBuffers, checksum
from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError

from .fields import Array


class Owner(Protocol):
    """The receiver that a sink belongs to."""

    @property
    def buffers(self) -> MultimodalDataBuffers: ...

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held by the manager's thread while it calls the sink; reentrant."""
        ...

    def consumed(self, epoch: int, offset: int) -> None:
        """A delivered chunk's blocks are no longer read."""

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """The transfer cannot go on."""

    def commit(self) -> None:
        """Tokens are used in a way that cannot be undone: from now on the content must stay what it is."""


class Sink(ABC):
    """Takes verified chunks. Called by the manager's thread, with its lock held."""

    owner: Owner

    @property
    def buffers(self) -> MultimodalDataBuffers:
        return self.owner.buffers

    def granted(self, epoch: int, start: int, blocks: tuple[int, ...]) -> None:  # noqa: B027  (a hook)
        """Blocks were granted for tokens from ``start`` on; most sinks need not know."""

    def examine(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        """Whether the chunk is what its checksum says; always, if it has none. Pauses for others now and then.

        A sink may copy it on the way, into what nobody reads yet: a pass over the bytes less. One is examined at a
        time."""
        yield from ()
        views = (view for _, view in self.buffers.chunk(chunk.blocks, 0, chunk.length))
        return chunk.checksum is None or checksum(views).to_bytes(8) == chunk.checksum

    @abstractmethod
    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        """A verified chunk; each token of an embedding comes once, in any order."""

    @abstractmethod
    def restart(self) -> None:
        """The content was replaced before any of it was used: everything comes again."""


class GatherSink(Sink):
    """Gathers into one array a field, of the final length: one copy, and the blocks are free again at once.

    :param in_place: an embedding granted whole in adjacent blocks is used where it lies, without any copy. Its blocks
        then stay with it until :meth:`drop`, so that others may have to wait for them: for callers that use an
        embedding at once, with a pool that is not tight.
    :param make: called with the length, once it is known: the arrays to gather into, uint8 [tokens, bytes a token] for
        each field. Memory that has been used before is worth it: new memory takes longer to get than to fill.
    """

    def __init__(self, *, in_place: bool = False, make: Callable[[int], dict[str, Array]] | None = None) -> None:
        self._make = make
        self.arrays: dict[str, Array] = {}
        self.chunks: dict[int, int] = {}  # offset: length of what was delivered; the origin's chunk_info
        self._may_stay = in_place
        self._first: tuple[int, tuple[int, ...]] = (0, ())  # epoch and blocks of the grant for token 0
        self._home = 0  # the epoch whose blocks are the arrays; 0: none
        self._passed: dict[int, tuple[int, tuple[int, ...]]] = {}  # offset: examined where they lie, not yet delivered
        self._kept: dict[int, tuple[int, ...]] = {}  # offset: blocks, of the chunks that stay where they lie

    @property
    def in_place(self) -> bool:
        """Whether the arrays are the blocks themselves."""
        return self._home != 0

    def granted(self, epoch: int, start: int, blocks: tuple[int, ...]) -> None:
        if start == 0:
            self._first = (epoch, blocks)

    def examine(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        if not self.arrays:
            self._begin(chunk.epoch, total_tokens)
        if chunk.epoch == self._home:
            if good := (yield from super().examine(chunk, total_tokens)):
                self._passed[chunk.offset] = (chunk.length, chunk.blocks)
            return good
        if self.in_place:
            self._move_out(total_tokens)
        digest = yield from self.buffers.gathering(
            chunk.blocks, 0, chunk.length, self.arrays, chunk.offset, digest=chunk.checksum is not None
        )
        return digest is None or digest.to_bytes(8) == chunk.checksum

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        self.chunks[chunk.offset] = chunk.length
        self._passed.pop(chunk.offset, None)
        if chunk.epoch == self._home:
            self._kept[chunk.offset] = chunk.blocks
        else:
            self.owner.consumed(chunk.epoch, chunk.offset)  # copied when it was examined

    def restart(self) -> None:
        self.arrays, self._home = {}, 0
        self._kept.clear()
        self._passed.clear()
        self.chunks.clear()

    def drop(self) -> None:
        """The arrays are no longer read."""
        kept, home = self._kept, self._home
        self.restart()
        for offset in kept:
            self.owner.consumed(home, offset)

    def _begin(self, epoch: int, total_tokens: int) -> None:
        """The first chunk is here, and the length is known: where will the embedding lie?"""
        first, blocks = self._first
        needed = blocks_needed(total_tokens, self.buffers.geometry.block_size)  # spare ones have gone back to the pool
        if self._may_stay and epoch == first and needed <= len(blocks):
            arrays = self.buffers.in_place(blocks[:needed], total_tokens)
            if arrays is not None:
                self.arrays, self._home = arrays, epoch
                return
        self.arrays = self._new(total_tokens)

    def _move_out(self, total_tokens: int) -> None:
        """A part came again in other blocks: what lies in place is gathered after all."""
        kept, home, self._home, self._kept = self._kept, self._home, 0, {}
        self.arrays = self._new(total_tokens)
        for offset, blocks in kept.items():
            self.buffers.gather_into(blocks, 0, self.chunks[offset], self.arrays, offset)
            self.owner.consumed(home, offset)
        for offset, (length, blocks) in self._passed.items():
            self.buffers.gather_into(blocks, 0, length, self.arrays, offset)

    def _new(self, total_tokens: int) -> dict[str, Array]:
        fields = self.buffers.geometry.layout.fields
        if self._make is not None:
            made = self._make(total_tokens)
            wrong = [f.name for f in fields if not _fits(made.get(f.name), (total_tokens, f.token_bytes))]
            if not wrong:
                return made
            why = f"the arrays given for {', '.join(wrong)} are not uint8, contiguous, of {total_tokens} tokens"
            self.owner.abort(LocalProtocolError(why))
        return {field.name: np.empty((total_tokens, field.token_bytes), np.uint8) for field in fields}


def _fits(array: Array | None, shape: tuple[int, int]) -> bool:
    return array is not None and array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous


@dataclass(frozen=True, slots=True)
class ArrivedChunk:
    """Tokens [offset, offset + length), where they lie: valid until :meth:`release`, which must be called once."""

    offset: int
    length: int
    blocks: tuple[int, ...]
    release: Callable[[], None]

    @property
    def chunk_info(self) -> tuple[int, int]:
        """(offset, length) in tokens."""
        return self.offset, self.length


class ChunkSink(Sink):
    """Hands chunks on as they come, in whatever order; the receiver's memory is then never more than the pool."""

    def __init__(self) -> None:
        self._arrived: deque[ArrivedChunk] = deque()

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        key = (chunk.epoch, chunk.offset)
        self._arrived.append(ArrivedChunk(chunk.offset, chunk.length, chunk.blocks, lambda: self.owner.consumed(*key)))

    def restart(self) -> None:
        self._arrived.clear()  # the machine has taken their blocks back

    def peek(self) -> ArrivedChunk | None:
        """The chunk that :meth:`pop` would take, or None."""
        return self._arrived[0] if self._arrived else None

    def pop(self) -> ArrivedChunk | None:
        """The next chunk, or None. Taking one commits."""
        with self.owner.lock:  # or else the content could be replaced in between
            if not self._arrived:
                return None
            self.owner.commit()
            return self._arrived.popleft()

    def read(self, chunk: ArrivedChunk) -> dict[str, Array]:
        """Its bytes, uint8 [length, bytes a token] a field: a view if its blocks are adjacent, else a copy."""
        whole = self.buffers.in_place(chunk.blocks, chunk.length)
        if whole is not None:
            return whole
        fields = self.buffers.geometry.layout.fields
        out: dict[str, Array] = {f.name: np.empty((chunk.length, f.token_bytes), np.uint8) for f in fields}
        self.buffers.gather_into(chunk.blocks, 0, chunk.length, out, 0)
        return out


def gathered(sink: Sink) -> GatherSink:
    """The sink as one that gathers.

    :raises LocalProtocolError: the receiver was made with another.
    """
    if not isinstance(sink, GatherSink):
        raise LocalProtocolError("this receiver hands its chunks on; take them from its sink")
    return sink
