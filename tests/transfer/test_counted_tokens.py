"""Tokens count for the user when the sink has them: the blocks of others may return to the pool at any time."""

from __future__ import annotations

import pytest

from embferry import EmbeddingReceiver, GatherSink, wait
from embferry.protocol.commands import Deliver
from embferry.protocol.errors import LocalProtocolError

from .conftest import LAYOUT, SECONDS, MakePair, embedding, same

CHUNK, TOKENS = 16, 64
SETTINGS = {"chunk_bytes": CHUNK * LAYOUT.token_bytes}


class Asking(GatherSink):
    """A sink that reads, while it is given a chunk, how many tokens count.

    Attributes:
        counted: By the first token of the chunk.
        fails_at: The first token of a chunk that it raises for.
    """

    receiver: EmbeddingReceiver

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__(in_place=True)
        self.counted: dict[int, int] = {}
        self.fails_at = fails_at

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        self.counted[chunk.offset] = self.receiver.transferred_tokens
        if chunk.offset == self.fails_at:
            raise RuntimeError("no")
        super().deliver(chunk, total_tokens)


def test_a_chunk_counts_after_the_sink_was_given_it(make_pair: MakePair) -> None:
    pair, rows, sink = make_pair(8, **SETTINGS), embedding(TOKENS), Asking()
    receiver = sink.receiver = pair.receiver(sink=sink)
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert sink.counted.keys() == set(range(0, TOKENS, CHUNK))
    assert all(counted <= offset for offset, counted in sink.counted.items())
    assert receiver.transferred_tokens == TOKENS
    assert same(receiver.arrays(), rows)
    receiver.clear()


def test_chunks_that_a_failed_sink_was_not_given_never_count(make_pair: MakePair) -> None:
    pair, rows, sink = make_pair(8, **SETTINGS), embedding(TOKENS), Asking(fails_at=0)
    receiver = sink.receiver = pair.receiver(sink=sink)
    receiver.init()
    pair.sender(receiver.room, rows)
    with pytest.raises(LocalProtocolError, match="deliver"):
        wait(receiver, SECONDS)
    read = receiver.buffered_chunks()
    assert read is not None
    assert {len(array) for array in read.values()} == {0}
    receiver.clear()
