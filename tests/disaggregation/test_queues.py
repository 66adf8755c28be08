"""The origin's queues: preallocate, transfer, arrive; bootstrap, encode, in flight."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest

from embferry import Fields, ReceiveManager, SendManager
from embferry.disaggregation.multimodal_embedding import (
    MultimodalEmbeddingBootstrapQueue,
    MultimodalEmbeddingInflightQueue,
    MultimodalEmbeddingRequest,
)
from embferry.disaggregation.multimodal_language import (
    EmbeddingTransferError,
    MultimodalLanguagePreallocQueue,
    MultimodalLanguageRequest,
    MultimodalLanguageTransferQueue,
)
from embferry.protocol.errors import Aborted, CapacityError, LocalProtocolError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transports.in_memory import InMemoryTransport

LAYOUT = Layout((Field("input_embeddings", "bfloat16", 8), Field("fill_ids", "int32", 1)))
SECONDS = 20.0


def embedding(tokens: int) -> Fields:
    rng = np.random.default_rng(tokens)
    return {f.name: rng.integers(0, 256, (tokens, f.token_bytes), np.uint8) for f in LAYOUT.fields}


class Sides:
    """Both sides with their queues, and what failed in them."""

    def __init__(self) -> None:
        self.receiving = ReceiveManager(Geometry(LAYOUT, num_blocks=2, block_size=8), [InMemoryTransport()])
        self.sending = SendManager(LAYOUT, [InMemoryTransport()])
        self.failures: list[tuple[object, EmbeddingTransferError]] = []
        self.prealloc = MultimodalLanguagePreallocQueue(self.note)
        self.transfer = MultimodalLanguageTransferQueue(self.note)
        self.bootstrap = MultimodalEmbeddingBootstrapQueue(self.note)
        self.inflight = MultimodalEmbeddingInflightQueue(self.note)

    def note(
        self, request: MultimodalLanguageRequest | MultimodalEmbeddingRequest, error: EmbeddingTransferError
    ) -> None:
        self.failures.append((request.req, error))

    def ask(self, name: str, room: int) -> MultimodalLanguageRequest:
        return self.prealloc.add(name, self.receiving.open(room, self.sending.endpoint))

    def offer(self, name: str, room: int, tokens: int) -> None:
        self.bootstrap.add(name, self.sending.open(room), tokens, b"digest", (0, -7))

    def close(self) -> None:
        self.sending.close()
        self.receiving.close()


@pytest.fixture
def sides() -> Iterator[Sides]:
    both = Sides()
    yield both
    both.close()


T = TypeVar("T")


def turn(pop: Callable[[], list[T]]) -> list[T]:
    """Turns of a scheduler's loop, until ``pop`` takes something out."""
    idle = threading.Event()
    for _ in range(int(SECONDS / 0.001)):
        if found := pop():
            return found
        idle.wait(0.001)  # what a scheduler does between two turns; nothing depends on how long
    raise AssertionError("nothing came")


def test_the_request_is_the_dataclass_its_users_know() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(MultimodalLanguageRequest)}
    assert list(fields) == [
        *("req", "embedding_receiver", "waiting_for_input", "current_allocation"),
        *("total_embedding_length", "transferred_tokens", "buffered_chunks", "needs_resume"),
    ]
    assert fields["total_embedding_length"] == -1
    assert fields["buffered_chunks"] is None
    assert fields["needs_resume"] is False


def test_where_tokens_have_arrived_the_length_is_known(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole embedding arrives while a request is updated: after its status is read, and before the tokens are."""
    asked = sides.ask("speak", 1)
    receiver = asked.embedding_receiver
    lengths = [30, -1]  # the later one, and the one of the first read

    def tokens(_: object) -> int:
        del lengths[1:]
        return 30

    monkeypatch.setattr(type(receiver), "transferred_tokens", property(tokens))
    monkeypatch.setattr(type(receiver), "total_embedding_length", property(lambda _: lengths[-1]))
    asked.update()
    assert (asked.transferred_tokens, asked.total_embedding_length) == (30, 30)


@pytest.mark.parametrize(
    ("fault", "wanted"), [(MemoryError(), CapacityError), (KeyError("x"), LocalProtocolError), (Aborted("x"), Aborted)]
)
def test_a_request_that_raises_fails_alone(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, fault: Exception, wanted: type[EmbeddingTransferError]
) -> None:
    for name, room in (("first", 1), ("second", 2)):
        sides.offer(name, room, 8)
    first, second = sides.ask("first", 1), sides.ask("second", 2)

    def raise_fault() -> None:
        raise fault

    monkeypatch.setattr(first.embedding_receiver, "buffered_chunks", raise_fault)
    assert turn(sides.prealloc.pop_preallocated) == [second]
    ((failed, error),) = sides.failures
    assert failed == "first"
    assert type(error) is wanted
    sides.transfer.add(second)
    for encode in turn(sides.bootstrap.pop_bootstrapped):
        encode.embedding_sender.send_embedding(embedding(8))
    monkeypatch.setattr(second.embedding_receiver, "buffered_chunks", raise_fault)
    assert sides.transfer.pop_arriving() == []  # the fault is reported below, and harms no other request
    assert sides.transfer.pop_transferred() == []
    assert [name for name, _ in sides.failures] == ["first", "second"]
    assert len(sides.transfer) == 0


@pytest.mark.parametrize("side", ["encode", "language"])
def test_failures_of_one_kind_have_one_line_with_the_room_once(
    sides: Sides, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    caplog.set_level("WARNING", "embferry.disaggregation")
    for room in range(11, 16):
        if side == "encode":
            sides.offer("unclaimed", room, 8)
        else:
            sides.ask("unanswered", room)
    queue = sides.bootstrap if side == "encode" else sides.prealloc
    for request in list(queue.queue):
        is_encode = isinstance(request, MultimodalEmbeddingRequest)
        (request.embedding_sender if is_encode else request.embedding_receiver).abort()
    pop = sides.bootstrap.pop_bootstrapped if side == "encode" else sides.prealloc.pop_preallocated

    def is_empty() -> list[bool]:
        assert pop() == []
        return [] if queue else [True]

    turn(is_empty)
    assert len(sides.failures) == 5
    (line,) = caplog.messages
    assert line.startswith("a transfer failed")
    assert line.count("room 11") == 1


def test_a_request_goes_through_all_queues(sides: Sides, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "embferry")
    rows = embedding(100)
    asked = sides.ask("speak", 1)
    assert not asked.embedding_receiver.aux.any()
    sides.offer("see", 1, 100)
    (encode,) = turn(sides.bootstrap.pop_bootstrapped)
    assert turn(sides.prealloc.pop_preallocated) == [asked]
    # Blocks may be granted before the length is known: those of the default allocation.
    assert turn(lambda: [asked] if asked.update() and asked.total_embedding_length == 100 else [])
    assert list(asked.embedding_receiver.aux[:3]) == [100, -7, 0]
    assert asked.waiting_for_input
    assert asked.current_allocation is not None
    sides.transfer.add(asked)
    encode.embedding_sender.send_embedding(rows, 40)
    assert turn(sides.transfer.pop_arriving) == [asked]
    assert sides.transfer.pop_arriving() == []  # once
    assert turn(lambda: [asked] if asked.update() and asked.transferred_tokens == 40 else [])
    assert asked.needs_resume
    assert not asked.waiting_for_input
    assert asked.buffered_chunks is not None
    assert np.array_equal(asked.buffered_chunks["input_embeddings"], rows["input_embeddings"][:40])
    assert sides.transfer.pop_transferred() == []
    encode.embedding_sender.send_embedding(rows)
    sides.inflight.add(encode)
    assert turn(sides.transfer.pop_transferred) == [asked]
    assert not asked.needs_resume
    assert np.array_equal(asked.embedding_receiver.arrays()["input_embeddings"], rows["input_embeddings"])
    assert turn(sides.inflight.pop_transferred) == [encode]
    assert "needs resume for remaining data" in caplog.text
    assert "completed with resumed transfer" in caplog.text
    assert not sides.failures


def test_a_failure_ends_one_request_and_no_other(sides: Sides) -> None:
    for room in (1, 2):
        sides.offer(f"see {room}", room, 30)
        sides.ask(f"speak {room}", room)
    encodes = {r.embedding_sender.room: r.embedding_sender for r in turn(lambda: both(sides))}
    for request in turn(sides.prealloc.pop_preallocated):
        sides.transfer.add(request)
    encodes[1].abort(Aborted("the picture is gone"))
    encodes[2].send_embedding(embedding(30))
    done = turn(lambda: _drive(sides))
    assert [request.req for request in done] == ["speak 2"]
    assert turn(lambda: _drive(sides) or [f for f in sides.failures if f[0] == "speak 1"])
    ((_, error),) = [f for f in sides.failures if f[0] == "speak 1"]
    assert isinstance(error, Aborted)
    assert "the picture is gone" in error.detail


def both(sides: Sides) -> list[MultimodalEmbeddingRequest]:
    """Takes two bootstrapped requests out together."""
    found = sides.bootstrap.queue
    if len(found) == 2 and all(r.embedding_sender.poll() >= 2 for r in found):
        return sides.bootstrap.pop_bootstrapped()
    return []


def _drive(sides: Sides) -> list[MultimodalLanguageRequest]:
    for request in sides.prealloc.pop_preallocated():
        sides.transfer.add(request)
    return sides.transfer.pop_transferred()


def test_an_aborted_request_gives_its_blocks_back(sides: Sides) -> None:
    sides.offer("see", 1, 100)
    asked = sides.ask("speak", 1)
    turn(sides.prealloc.pop_preallocated)
    sides.transfer.add(asked)
    assert sides.transfer.abort("speak")
    assert not sides.transfer.abort("speak")
    assert len(sides.transfer) == 0
    assert turn(lambda: [1] if sides.receiving.allocator.available == 2 else [])
    turn(lambda: sides.bootstrap.pop_bootstrapped() or sides.failures)
    assert [(name, error.code) for name, error in sides.failures] == [("see", "aborted")]
