"""Receivers that change their encode worker, rooms that are opened again, and unused connections."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import pytest

from embferry import SendManager, wait
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, PeerGone
from embferry.protocol.states import KVPoll
from embferry.transfer.control.limits import DEFAULTS
from embferry.transfer.control.sockets import SocketControl

from .conftest import LAYOUT, SECONDS, MakePair, advance_clock, embedding, kill, same


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_a_lost_encode_worker_can_be_replaced_during_the_failover_timeout(make_pair: MakePair) -> None:
    pair = make_pair(drain_timeout=0.1)
    rows, first = embedding(1000), pair.sending
    receiver = pair.receiving.open(secrets.randbits(60), first.endpoint, failover_timeout=SECONDS)
    seen: list[EmbeddingTransferError | None] = []
    receiver.on_change(lambda: seen.append(receiver.lost))
    receiver.init()
    pair.sender(receiver.room, rows, ready=320)
    until(lambda: receiver.transferred_tokens == 320)
    assert receiver.lost is None
    kill(first)  # its thread ends without a message, as in a killed process
    advance_clock(pair.receiving, first.settings.peer_timeout)
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
    assert receiver.verified_tokens == 1000


def test_without_a_replacement_the_loss_becomes_the_error(make_pair: MakePair) -> None:
    pair = make_pair(drain_timeout=0.1)
    receiver = pair.receiving.open(7, pair.sending.endpoint, failover_timeout=0.1)
    receiver.init()
    pair.sender(7, embedding(1000), ready=320)
    until(lambda: receiver.transferred_tokens == 320)
    kill(pair.sending)
    advance_clock(pair.receiving, pair.sending.settings.peer_timeout)
    until(lambda: receiver.poll() is KVPoll.Failed)
    with pytest.raises(PeerGone):
        raise receiver.failure_exception()
    assert receiver.lost is None


def test_a_room_that_has_ended_can_be_opened_again(make_pair: MakePair) -> None:
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


def test_unused_control_connections_are_closed(make_pair: MakePair) -> None:
    pair = make_pair(linger=0.01)
    others = [SendManager(LAYOUT, [pair.transport()]) for _ in range(DEFAULTS.idle_connections + 3)]
    pair.extra += others
    for other in others:
        receiver = pair.receiving.open(secrets.randbits(60), other.endpoint)
        receiver.init()
        sender = other.open(receiver.room)
        sender.init(10, b"digest")
        sender.send_embedding(embedding(10))
        wait(receiver, SECONDS)
        receiver.clear()
    control = pair.receiving._runtime.control
    assert isinstance(control, SocketControl)
    until(lambda: control.connections <= DEFAULTS.idle_connections)
