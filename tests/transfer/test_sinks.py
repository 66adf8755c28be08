"""A gathering sink alone, in orders of events that are rare in whole transfers."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import numpy as np
import pytest

from embferry import GatherSink
from embferry.memory.buffers import MultimodalDataBuffers, checksum
from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry

from .conftest import LAYOUT, embedding, same

SIZE = 16
TOKENS = 40


class Owner:
    """The owner of a sink: a double of a receiver, with an embedding in its blocks."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self.buffers = MultimodalDataBuffers(Geometry(LAYOUT, 8, SIZE), shared=False)
        self.lock: AbstractContextManager[object] = threading.RLock()
        self.rows = embedding(TOKENS)
        self.gone: list[tuple[int, int]] = []
        self.put(0, TOKENS, blocks)

    def put(self, offset: int, length: int, blocks: tuple[int, ...]) -> None:
        for index, token, at, nbytes in self.buffers.geometry.spans(blocks, 0, length):
            field = LAYOUT.fields[index]
            rows = self.rows[field.name][offset + token : offset + token + nbytes // field.token_bytes]
            self.buffers.view[at : at + nbytes] = rows.tobytes()

    def consumed(self, epoch: int, offset: int) -> None:
        self.gone.append((epoch, offset))

    committed = False
    content_digest = b"digest"

    def commit(self) -> bool:
        self.committed = True
        return True

    def copied(self) -> None: ...

    def abort(self, error: EmbeddingTransferError | None = None) -> None: ...

    def verify(self, epoch: int, offset: int, length: int, blocks: tuple[int, ...]) -> Verify:
        fields = (self.rows[field.name][offset : offset + length].tobytes() for field in LAYOUT.fields)
        digest = checksum(memoryview(field) for field in fields).to_bytes(8)
        return Verify(epoch, offset, length, blocks, digest)


def deliver(check: Verify) -> Deliver:
    return Deliver(check.epoch, check.offset, check.length, check.blocks)


def good(sink: GatherSink, check: Verify, total: int) -> bool:
    """Runs a verification to its end. Returns whether the chunk is good."""
    passes = sink.verify(check, total)
    while True:
        try:
            next(passes)
        except StopIteration as end:
            return bool(end.value)


def test_chunks_verified_in_place_are_gathered_when_another_arrives_in_other_blocks() -> None:
    owner, sink = Owner((0, 1, 2)), GatherSink(in_place=True)
    sink.owner = owner
    sink.granted(1, 0, (0, 1, 2))
    kept, passed = owner.verify(1, 0, SIZE, (0,)), owner.verify(1, 32, 8, (2,))
    owner.put(16, SIZE, (5,))  # the middle chunk was damaged and arrives again in another block
    again = owner.verify(2, 16, SIZE, (5,))
    assert good(sink, kept, TOKENS)
    sink.deliver(deliver(kept), TOKENS)
    assert sink.in_place
    assert good(sink, passed, TOKENS)  # both are verified before either is delivered
    assert good(sink, again, TOKENS)
    assert not sink.in_place
    sink.deliver(deliver(passed), TOKENS)
    sink.deliver(deliver(again), TOKENS)
    owner.buffers.view[:] = bytes(len(owner.buffers.view))
    assert same(sink.arrays, owner.rows)
    assert sorted(owner.gone) == [(1, 0), (1, 32), (2, 16)]


def test_a_bad_chunk_does_not_change_other_tokens() -> None:
    owner, sink = Owner((3, 6, 1)), GatherSink()
    sink.owner = owner
    sink.granted(1, 0, (3, 6, 1))
    fine = owner.verify(1, 0, SIZE, (3,))
    assert good(sink, fine, TOKENS)
    sink.deliver(deliver(fine), TOKENS)
    bad = Verify(1, 16, SIZE, (6,), b"12345678")
    assert not good(sink, bad, TOKENS)
    for name, rows in owner.rows.items():
        assert np.array_equal(sink.arrays[name][:SIZE], rows[:SIZE])
    assert sink.chunks == {0: SIZE}


def test_a_sink_gathers_into_the_caller_s_arrays() -> None:
    mine = {f.name: np.zeros((TOKENS, f.token_bytes), np.uint8) for f in LAYOUT.fields}
    owner, sink = Owner((3, 6, 1)), GatherSink(make=lambda total: mine)
    sink.owner = owner
    whole = owner.verify(1, 0, TOKENS, (3, 6, 1))
    assert good(sink, whole, TOKENS)
    assert sink.arrays is mine
    assert same(mine, owner.rows)


def test_arrays_of_another_shape_are_refused() -> None:
    owner = Owner((3, 6, 1))
    sink = GatherSink(make=lambda total: {"fill_ids": np.zeros((total, 4), np.int32)})  # type: ignore[dict-item]
    sink.owner = owner
    with pytest.raises(LocalProtocolError, match="fill_ids"):
        sink.prepare(owner.verify(1, 0, TOKENS, (3, 6, 1)), TOKENS)
