"""Checksums of large chunks, which a sender takes in steps: other transfers go on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from embferry import wait
from embferry.protocol.errors import Aborted, EmbeddingTransferError
from embferry.protocol.layout import Layout
from embferry.testing.pair import eventually
from embferry.transfer import writer
from embferry.transfer.checksums import checksum_steps
from embferry.transfer.fields import Fields

from .conftest import LAYOUT, SECONDS, MakePair, embedding, same

SMALL, LARGE = 10, 100
"""Tokens of embeddings of one chunk each."""
ROOMY = 32
"""Blocks of a pool that has room for both."""

Steps = Generator[None, None, bytes]


def take_in_steps(monkeypatch: pytest.MonkeyPatch, steps: Callable[[Layout, Fields, int, int], Steps]) -> None:
    """Checksums of large chunks are taken by ``steps``, those of small chunks at once."""
    monkeypatch.setattr(writer, "AT_ONCE_BYTES", SMALL * LAYOUT.token_bytes)
    monkeypatch.setattr(writer, "checksum_steps", steps)


def endless(begun: threading.Event) -> Callable[..., Steps]:
    def steps(*arguments: object) -> Steps:
        begun.set()
        while True:
            yield

    return steps


def test_a_small_transfer_ends_while_the_checksum_of_a_large_chunk_is_taken(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, small_has_ended = threading.Event(), threading.Event()

    def steps(layout: Layout, rows: Fields, offset: int, length: int) -> Steps:
        begun.set()
        while not small_has_ended.is_set():
            yield
        return (yield from checksum_steps(layout, rows, offset, length))

    take_in_steps(monkeypatch, steps)
    pair, small, large = make_pair(ROOMY), embedding(SMALL), embedding(LARGE, 1)
    first, second = pair.receiver(), pair.receiver()
    first.init()
    pair.sender(first.room, large)
    assert begun.wait(SECONDS)
    second.init()
    pair.sender(second.room, small)
    wait(second, SECONDS)
    small_has_ended.set()
    wait(first, SECONDS)
    assert same(second.arrays(), small)
    assert same(first.arrays(), large)


def test_the_lock_is_not_held_while_a_checksum_is_taken(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []

    def steps(layout: Layout, rows: Fields, offset: int, length: int) -> Steps:
        yield
        with ThreadPoolExecutor(1) as other:  # opening a room takes the lock
            rooms.append(other.submit(pair.sending.open, 77).result(SECONDS).room)
        return (yield from checksum_steps(layout, rows, offset, length))

    take_in_steps(monkeypatch, steps)
    pair, rows = make_pair(ROOMY), embedding(LARGE)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert rooms == [77]
    assert same(receiver.arrays(), rows)


def test_an_abort_ends_a_checksum(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    take_in_steps(monkeypatch, endless(begun))
    pair = make_pair(ROOMY)
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(LARGE))
    assert begun.wait(SECONDS)
    assert not sender.source_released
    sender.abort(Aborted("not needed any more"))
    eventually(lambda: sender.source_released)
    with pytest.raises(Aborted, match="not needed any more"):
        wait(receiver, SECONDS)


def test_closing_ends_a_checksum(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    take_in_steps(monkeypatch, endless(begun))
    pair = make_pair(ROOMY)
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(LARGE))
    assert begun.wait(SECONDS)
    pair.sending.close()
    assert sender.source_released
    assert sender.failure_exception() is not None
    with pytest.raises(EmbeddingTransferError):
        wait(receiver, SECONDS)
