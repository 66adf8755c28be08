"""A sink that receives an embedding, and the state of its file at every moment at which its process could be killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from embferry.kept import file as file_module
from embferry.kept.sink import KeptSink
from embferry.memory import buffers
from embferry.protocol.commands import Verify
from embferry.protocol.ranges import RangeSet
from tests.transfer.test_sinks import SIZE, TOKENS, Owner, deliver

from .workers import DIGEST, holds, names, ranges, taken, worker

CHUNKS = ((32, 8, (2,)), (0, 16, (0,)), (16, 16, (1,)))
"""Offset, length and blocks, in the order of their arrival."""
PASS_BYTES = 256


class Moments:
    """Looks at a file, as a worker that takes it over would see it.

    Attributes:
        delivered: The tokens that the file must have.
        next: Those that it may have already.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.delivered, self.next = RangeSet(), RangeSet()
        self.seen = 0

    def look(self) -> None:
        """Checks what would be left if the process were killed now."""
        self.seen += 1
        copy = self.place.parent / "copy"
        copy.mkdir(0o700)
        for name in names(self.place):
            shutil.copy(self.place / name, copy / name)
        file = taken(copy)
        assert ranges(file) in (list(self.delivered), list(self.next)), "it says something that is not so"
        assert holds(file), "it has other rows than those that were sent"
        shutil.rmtree(copy)

    @contextmanager
    def torn(self, *, backwards: bool) -> Iterator[None]:
        """Writes every record byte by byte, with a look between any two of them."""
        write = os.pwrite

        def torn(fd: int, data: bytes, at: int) -> int:
            for index in sorted(range(len(data)), reverse=backwards):
                write(fd, data[index : index + 1], at + index)
                self.look()
            return len(data)

        with patch.object(file_module.os, "pwrite", torn):
            yield


def receives_at_every_moment(place: Path) -> None:
    """Receives an embedding in chunks, of which one is damaged at first."""
    owner = Owner((0, 1, 2))
    sink = KeptSink(worker(place))
    sink.owner = owner
    moments = Moments(place)
    with patch.object(buffers, "PASS_BYTES", PASS_BYTES):
        for number, (offset, length, blocks) in enumerate(CHUNKS):
            check = owner.verify(1, offset, length, blocks)
            if number == 1:
                place_of = owner.buffers.geometry.spans(blocks, 0, length)
                at = next(span[2] for span in place_of)
                owner.buffers.view[at] ^= 1
                assert not _run(sink, check, moments.look)
                owner.buffers.view[at] ^= 1
            assert _run(sink, check, moments.look)
            moments.next.add(offset, offset + length)
            with moments.torn(backwards=number == 0):
                sink.deliver(deliver(check), TOKENS)
            moments.delivered.add(offset, offset + length)
            moments.look()
    assert moments.seen > 100
    assert list(moments.delivered) == [(0, TOKENS)]
    sink.drop()
    assert names(place) == []
    owner.buffers.close()


def receives_late_chunk_of_another_content(place: Path) -> None:
    """A chunk is being verified when another sender offers another content: it matches, and is not delivered."""
    owner = Owner((0, 1, 2))
    sink = KeptSink(worker(place))
    sink.owner = owner
    moments = Moments(place)
    assert _run(sink, owner.verify(1, 0, SIZE, (0,)), lambda: None)
    moments.look()
    owner.content_digest = b"another"
    sink.restart()
    assert names(place) == []
    assert _run(sink, owner.verify(2, SIZE, SIZE, (1,)), lambda: None)
    sink.deliver(deliver(owner.verify(2, SIZE, SIZE, (1,))), TOKENS)
    assert taken(place, digest=DIGEST) is None
    sink.drop()
    owner.buffers.close()


def _run(sink: KeptSink, check: Verify, look: Callable[[], None]) -> bool:
    """Verifies a chunk, and looks after each of its passes."""
    if sink.needs_preparation(check):
        sink.prepare(check, TOKENS)
        look()
    passes = sink.verify(check, TOKENS)
    while True:
        try:
            next(passes)
        except StopIteration as end:
            look()
            return bool(end.value)
        look()
