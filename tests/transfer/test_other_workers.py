"""One encode worker after another: replaced when it is lost, asked again, and forgotten when nobody needs it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import pytest

from embferry import SendManager, wait
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, PeerGone
from embferry.protocol.states import KVPoll
from embferry.transfer.receive_manager import MAX_PEERS

from .conftest import LAYOUT, MakePair, embedding, same

SECONDS = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_one_that_is_lost_may_be_replaced_while_there_is_time(make_pair: MakePair) -> None:
    pair = make_pair(peer_timeout=0.3, drain_timeout=0.1)
    rows, first = embedding(1000), pair.sending
    receiver = pair.receiving.open(secrets.randbits(60), first.endpoint, failover_timeout=SECONDS)
    seen: list[EmbeddingTransferError | None] = []
    receiver.on_change(lambda: seen.append(receiver.lost))
    receiver.init()
    pair.sender(receiver.room, rows, ready=320)
    until(lambda: receiver.transferred_tokens == 320)
    assert receiver.lost is None
    first.stop()  # its thread ends without a word, as a killed process does
    until(lambda: bool(seen) and seen[-1] is not None)
    assert isinstance(receiver.lost, PeerGone)
    assert receiver.poll() is KVPoll.Transferring
    second = SendManager(LAYOUT, [pair.transport()], settings=first.settings)
    pair.extra.append(second)
    receiver.redirect(second.endpoint)
    assert receiver.lost is None
    sender = second.open(receiver.room)
    sender.init(1000, b"digest")
    sender.send_embedding(rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert sender.sent_bytes == 680 * LAYOUT.token_bytes
    assert receiver.examined_tokens == 1000


def test_a_loss_without_a_replacement_is_reported_as_what_it_was(make_pair: MakePair) -> None:
    pair = make_pair(peer_timeout=0.2, drain_timeout=0.1)
    receiver = pair.receiving.open(7, pair.sending.endpoint, failover_timeout=0.1)
    receiver.init()
    pair.sender(7, embedding(1000), ready=320)
    until(lambda: receiver.transferred_tokens == 320)
    pair.sending.stop()
    until(lambda: receiver.poll() is KVPoll.Failed)
    with pytest.raises(PeerGone, match=r"silent for 0\.2 s at token 320"):
        raise receiver.failure_exception()
    assert receiver.lost is None


def test_a_room_that_has_ended_may_be_opened_again(make_pair: MakePair) -> None:
    pair = make_pair()
    sender = pair.sending.open(7)
    sender.init(10, b"digest")
    with pytest.raises(LocalProtocolError, match="in use"):
        pair.sending.open(7)
    sender.abort()
    rows = embedding(10)
    pair.sender(7, rows)
    receiver = pair.receiver(7)
    receiver.init()
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)


def test_connections_that_nobody_needs_any_more_are_given_up(make_pair: MakePair) -> None:
    pair = make_pair(linger=0.01)

    def call(port: int) -> None:
        receiver = pair.receiving.open(port, f"tcp://127.0.0.1:{port}")
        receiver.init()
        receiver.abort()

    for port in range(1, 3 * MAX_PEERS):
        call(port)
    rows, receiver = embedding(10), pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    ports = iter(range(60000, 65000))

    def few_are_left() -> bool:
        call(next(ports))
        return len(pair.receiving._peers) <= MAX_PEERS + 2

    until(few_are_left)
