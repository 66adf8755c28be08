"""A send manager reports receivers whose room is not open, so that its user can open the room for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest

from embferry import (
    EmbeddingReceiver,
    Field,
    Geometry,
    InMemoryTransport,
    KVPoll,
    Layout,
    LeaseExpired,
    ReceiveManager,
    SendManager,
    TransferSettings,
    as_fields,
    wait,
)

pytestmark = pytest.mark.integration

LAYOUT = Layout((Field("input_embeddings", "float32", 8),))
SENT = np.arange(50 * 8, dtype=np.float32).reshape(50, 8)
GUARD_S = 60.0
PATIENT = TransferSettings(bootstrap_timeout=GUARD_S, answer_timeout=GUARD_S)


class Pair:
    """Both managers; ``asked`` has each request, and ``serve`` is called with its room."""

    def __init__(self, settings: TransferSettings = PATIENT) -> None:
        self.sending = SendManager(LAYOUT, [InMemoryTransport()], settings=settings)
        self.receiving = ReceiveManager(Geometry(LAYOUT, 4, 4), [InMemoryTransport()], settings=PATIENT, name="a name")
        self.asked: list[tuple[int, str]] = []
        self.serve: Callable[[int], None] = self.send
        self.sending.on_request(self.requested)

    def requested(self, room: int, name: str) -> None:
        self.asked.append((room, name))
        self.serve(room)

    def send(self, room: int) -> None:
        sender = self.sending.open(room)
        sender.init(len(SENT), b"digest")
        sender.send_embedding(as_fields({"input_embeddings": SENT}))

    def ask(self, room: int, name: str | None = None) -> EmbeddingReceiver:
        receiver = self.receiving.open(room, self.sending.endpoint, name=name)
        receiver.init()
        return receiver

    def receive(self, room: int, name: str | None = None) -> EmbeddingReceiver:
        receiver = self.ask(room, name)
        wait(receiver, GUARD_S)
        return receiver

    def close(self) -> None:
        self.receiving.close()
        self.sending.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield stack.enter_context(closing(Pair()))


def arrived(receiver: EmbeddingReceiver) -> bool:
    got = receiver.arrays()["input_embeddings"].view(np.float32)
    return receiver.poll() is KVPoll.Success and np.array_equal(got.reshape(SENT.shape), SENT)


def test_a_room_is_opened_when_a_receiver_asks_for_it(pair: Pair) -> None:
    assert arrived(pair.receive(1))
    assert arrived(pair.receive(2, "another name"))
    assert pair.asked == [(1, "a name"), (2, "another name")]


def test_an_open_room_is_not_reported(pair: Pair) -> None:
    pair.send(1)
    assert arrived(pair.receive(1))
    assert pair.asked == []


def test_a_room_that_has_ended_is_reported_to_a_new_receiver(pair: Pair) -> None:
    for _ in range(3):
        receiver = pair.receive(1)
        assert arrived(receiver)
        receiver.clear()
    assert pair.asked == [(1, "a name")] * 3


def test_a_refused_receiver_learns_the_reason_at_once(pair: Pair) -> None:
    pair.serve = lambda room: pair.sending.open(room).abort(LeaseExpired("too late"))
    with pytest.raises(LeaseExpired, match="too late"):
        pair.receive(1)


def test_a_request_is_reported_again_until_the_room_is_open(pair: Pair) -> None:
    """The receiver repeats it."""
    refusals = iter(range(2))

    def serve(room: int) -> None:
        if next(refusals, None) is None:
            pair.send(room)

    pair.serve = serve
    assert arrived(pair.receive(1))
    assert pair.asked == [(1, "a name")] * 3


def test_a_callback_that_fails_harms_no_transfer(pair: Pair) -> None:
    def serve(room: int) -> None:
        if room == 1:
            raise RuntimeError("a bug of the user")
        pair.send(room)

    pair.serve = serve
    receiver = pair.ask(1)
    assert arrived(pair.receive(2))
    receiver.abort()


def test_no_more_requests_are_reported_at_a_time_than_are_parked() -> None:
    """The others are reported when their receivers repeat them."""
    few = TransferSettings(bootstrap_timeout=GUARD_S, answer_timeout=GUARD_S, parked_requests=2)
    with closing(Pair(few)) as pair:
        is_served = threading.Event()

        def serve(room: int) -> None:
            assert is_served.wait(GUARD_S)
            pair.send(room)

        pair.serve = serve
        receivers = [pair.ask(room) for room in range(6)]
        deadline = time.monotonic() + GUARD_S
        while len(pair.sending._reported) < 2:
            assert time.monotonic() < deadline
        assert len(pair.sending._reported) == 2
        is_served.set()
        for receiver in receivers:
            wait(receiver, GUARD_S)
            assert arrived(receiver)
