"""Sinks: where data goes on arrival. Gathered, used in place, or handed on chunk by chunk."""

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
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, shown
from embferry.protocol.kept import KeptTokens
from embferry.protocol.layout import Layout

from .fields import Array


class Owner(Protocol):
    """The transfer that a sink belongs to. Any thread may call it."""

    @property
    def committed(self) -> bool:
        """Whether tokens are in use."""
        ...

    @property
    def buffers(self) -> MultimodalDataBuffers: ...

    @property
    def content_digest(self) -> bytes:
        """The digest that the sender has announced; empty before it has."""
        ...

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held during every call of the sink's methods; reentrant. It guards what other threads share with the sink."""
        ...

    def consumed(self, epoch: int, offset: int) -> None:
        """The blocks of a delivered chunk are no longer read."""

    def copied(self) -> None:
        """:attr:`Sink.is_complete` may have changed."""

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer."""

    def commit(self) -> bool:
        """Tokens are about to be used: from now on another content for the room is an error.

        Returns:
            False if the content is being replaced at this moment: then nothing may be used.
        """
        ...


class Sink(ABC):
    """Verifies chunks and takes them. One sink serves one transfer.

    The driver thread calls every method but :meth:`prepare`, with the sink's own lock (:attr:`Owner.lock`) held and no
    other. No other transfer of the manager advances meanwhile, so a method must not block. If one raises, this transfer
    fails with an error that names the exception, and the sink is not called again.
    """

    owner: Owner

    @property
    def buffers(self) -> MultimodalDataBuffers:
        return self.owner.buffers

    @property
    def kept(self) -> KeptTokens | None:
        """Tokens that the sink has before its transfer begins. Read once, by the thread that opens the transfer.

        They are not sent again if the sender offers the same content; otherwise :meth:`restart` is called.
        """
        return None

    @property
    def is_complete(self) -> bool:
        """Whether every delivered chunk is where it belongs. The transfer has succeeded only then."""
        return True

    def needs_preparation(self, chunk: Verify) -> bool:
        """Returns whether :meth:`prepare` must be called before ``chunk`` is verified."""
        return False

    def prepare(self, chunk: Verify, total_tokens: int) -> None:  # noqa: B027  (a hook)
        """Does what takes time before data is taken, such as allocating memory.

        Called on the callback thread with the sink's lock held: it may block, other transfers go on.
        """

    def granted(self, epoch: int, start: int, blocks: tuple[int, ...]) -> None:  # noqa: B027  (a hook)
        """Blocks were granted for tokens from ``start`` on. Called before a chunk of them is verified.

        Most sinks ignore this.
        """

    def verify(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        """Compares a chunk with its checksum, step by step: a generator that yields between parts of the chunk.

        A sink may copy the bytes in the same pass, to memory that is not read yet. One chunk of a transfer is verified
        at a time.

        Returns:
            Whether the chunk matches; True if it has no checksum.
        """
        yield from ()
        views = (view for _, view in self.buffers.chunk(chunk.blocks, 0, chunk.length))
        return chunk.checksum is None or checksum(views).to_bytes(8) == chunk.checksum

    @abstractmethod
    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        """Takes a verified chunk. Chunks come in any order, each token of the embedding once."""

    @abstractmethod
    def restart(self) -> None:
        """Forgets everything: the content was replaced before any of it was used, and will arrive again."""


class GatherSink(Sink):
    """Gathers each field into one array of the final length: one copy, after which the blocks are free again.

    Args:
        in_place: Use an embedding where it lies, without a copy, if it was granted whole in adjacent blocks. Its blocks
            then stay in use until :meth:`drop`, and other transfers may wait for them. For callers that use embeddings
            at once and have a large pool.
        make: Returns the arrays to gather into, uint8 [tokens, bytes a token] for each field, given the number of
            tokens. Called when the first chunk has arrived, on the manager's callback thread, with the lock of this
            sink held: it may block, other transfers go on. Reused memory is faster: the kernel takes longer to provide
            new pages than the copy takes.

    Attributes:
        arrays: Field name to uint8 [tokens, bytes a token]; empty before the first chunk.
        chunks: Offset to length, in tokens, of every delivered chunk: the origin's ``chunk_info``.
    """

    def __init__(self, *, in_place: bool = False, make: Callable[[int], dict[str, Array]] | None = None) -> None:
        self._make = make
        self.arrays: dict[str, Array] = {}
        self.chunks: dict[int, int] = {}
        self._may_stay = in_place
        self._first: tuple[int, tuple[int, ...]] = (0, ())  # epoch and blocks of the grant for token 0
        self._home = 0  # the epoch whose blocks are the arrays; 0: none
        self._passed: dict[int, tuple[int, tuple[int, ...]]] = {}  # offset: verified in place, not yet delivered
        self._kept: dict[int, tuple[int, ...]] = {}  # offset: blocks of the chunks used in place
        self._lent: list[tuple[int, int]] = []  # epoch and offset of chunks that were moved out while in use

    @property
    def in_place(self) -> bool:
        """Whether the arrays are the blocks themselves."""
        return self._home != 0

    def granted(self, epoch: int, start: int, blocks: tuple[int, ...]) -> None:
        if start == 0:
            self._first = (epoch, blocks)

    def needs_preparation(self, chunk: Verify) -> bool:
        return self._make is not None and not self._is_placed(chunk)

    def prepare(self, chunk: Verify, total_tokens: int) -> None:
        self._place(chunk, total_tokens)

    def verify(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        self._place(chunk, total_tokens)
        if chunk.epoch == self._home:
            if good := (yield from super().verify(chunk, total_tokens)):
                self._passed[chunk.offset] = (chunk.length, chunk.blocks)
            return good
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
            self.owner.consumed(chunk.epoch, chunk.offset)  # it was copied during verification

    def restart(self) -> None:
        self.arrays, self._home = {}, 0
        self._kept, self._passed, self.chunks, self._lent = {}, {}, {}, []

    def drop(self) -> None:
        """Releases the arrays, which are no longer read."""
        kept = [(self._home, offset) for offset in self._kept] + self._lent
        self.restart()
        for epoch, offset in kept:
            self.owner.consumed(epoch, offset)

    def _is_placed(self, chunk: Verify) -> bool:
        """Returns whether there is a place for ``chunk``."""
        return bool(self.arrays) and (not self.in_place or chunk.epoch == self._home)

    def _place(self, chunk: Verify, total_tokens: int) -> None:
        """Chooses where the embedding lies when its first chunk has arrived, or when it cannot stay there."""
        if not self.arrays:
            self._begin(chunk.epoch, total_tokens)
        if not self._is_placed(chunk):
            self._move_out(total_tokens)

    def _begin(self, epoch: int, total_tokens: int) -> None:
        first, blocks = self._first
        needed = blocks_needed(total_tokens, self.buffers.geometry.block_size)  # spare ones have returned to the pool
        if self._may_stay and epoch == first and needed <= len(blocks):
            arrays = self.buffers.in_place(blocks[:needed], total_tokens)
            if arrays is not None:
                self.arrays, self._home = arrays, epoch
                return
        self.arrays = self._new(total_tokens)

    def _move_out(self, total_tokens: int) -> None:
        """Copies the chunks used in place: a part of the embedding has arrived in other blocks.

        The caller may be reading the old arrays: then their blocks stay in use until :meth:`drop`.
        """
        arrays = self._new(total_tokens)
        for offset in self._kept:
            self.buffers.gather_into(self._kept[offset], 0, self.chunks[offset], arrays, offset)
        for offset, (length, blocks) in self._passed.items():
            self.buffers.gather_into(blocks, 0, length, arrays, offset)
        left = [(self._home, offset) for offset in self._kept]
        self.arrays, self._home, self._kept = arrays, 0, {}
        if self.owner.committed:
            self._lent += left
            return
        for epoch, offset in left:
            self.owner.consumed(epoch, offset)

    def _new(self, total_tokens: int) -> dict[str, Array]:
        fields = self.buffers.geometry.layout.fields
        if self._make is not None:
            made = self._make(total_tokens)
            wrong = [f.name for f in fields if not _fits(made.get(f.name), (total_tokens, f.token_bytes))]
            if not wrong:
                return made
            raise LocalProtocolError(
                f"make() returned arrays for {', '.join(wrong)} that are not contiguous uint8 of {total_tokens} tokens"
            )
        return plain_arrays(self.buffers.geometry.layout, total_tokens)


def plain_arrays(layout: Layout, total_tokens: int) -> dict[str, Array]:
    """Returns arrays to gather into, in ordinary memory."""
    return {field.name: np.empty((total_tokens, field.token_bytes), np.uint8) for field in layout.fields}


def _fits(array: Array | None, shape: tuple[int, int]) -> bool:
    return array is not None and array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous


@dataclass(frozen=True, slots=True)
class ArrivedChunk:
    """Tokens ``[offset, offset + length)`` in the pool. Valid until :meth:`release`, which must be called once."""

    offset: int
    length: int
    blocks: tuple[int, ...]
    release: Callable[[], None]

    @property
    def chunk_info(self) -> tuple[int, int]:
        """(offset, length) in tokens."""
        return self.offset, self.length


class ChunkSink(Sink):
    """Hands chunks on as they arrive, in any order. The receiver then needs no memory beyond the pool."""

    def __init__(self) -> None:
        self._arrived: deque[ArrivedChunk] = deque()

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        key = (chunk.epoch, chunk.offset)
        self._arrived.append(ArrivedChunk(chunk.offset, chunk.length, chunk.blocks, lambda: self.owner.consumed(*key)))

    def restart(self) -> None:
        self._arrived.clear()  # the machine releases their blocks

    def peek(self) -> ArrivedChunk | None:
        """Returns the chunk that :meth:`pop` would take, or None."""
        return self._arrived[0] if self._arrived else None

    def pop(self) -> ArrivedChunk | None:
        """Takes the next chunk, or returns None. Taking one commits: another content is an error from now on."""
        with self.owner.lock:
            if not self._arrived or not self.owner.commit():
                return None
            return self._arrived.popleft()

    def read(self, chunk: ArrivedChunk) -> dict[str, Array]:
        """Returns a chunk, uint8 [length, bytes a token] a field: a view if its blocks are adjacent, else a copy."""
        whole = self.buffers.in_place(chunk.blocks, chunk.length)
        if whole is not None:
            return whole
        fields = self.buffers.geometry.layout.fields
        out: dict[str, Array] = {f.name: np.empty((chunk.length, f.token_bytes), np.uint8) for f in fields}
        self.buffers.gather_into(chunk.blocks, 0, chunk.length, out, 0)
        return out


def check_sink(sink: Sink | None, room: int) -> Sink:
    """Returns ``sink`` if it can serve a transfer; a new one that gathers if it is None.

    Raises:
        LocalProtocolError: It is no sink, or it serves another transfer.
    """
    if sink is None:
        return GatherSink()
    if not isinstance(sink, Sink):
        raise LocalProtocolError(f"sink must be an object of a subclass of Sink, not {shown(sink, 80)}", room=room)
    if getattr(sink, "owner", None) is not None:
        raise LocalProtocolError("this sink serves another transfer; make a new one for each", room=room)
    return sink


def gathered(sink: Sink) -> GatherSink:
    """Returns ``sink`` if it gathers.

    Raises:
        LocalProtocolError: It does not.
    """
    if not isinstance(sink, GatherSink):
        raise LocalProtocolError("this receiver hands its chunks on; take them from its sink")
    return sink
