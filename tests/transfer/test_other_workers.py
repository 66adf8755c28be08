"""Receivers that change their encode worker, rooms that are opened again, and unused connections."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from embferry import SendManager, wait
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, PeerGone
from embferry.protocol.messages import Confirm
from embferry.protocol.states import KVPoll
from embferry.transfer.control.limits import DEFAULTS
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.control_messages import ControlMessages

from .conftest import LAYOUT, SECONDS, MakePair, advance_clock, embedding, kill, let_turn, same


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


@pytest.mark.parametrize("shared", [False, True], ids=["of this transfer alone", "of two transfers"])
def test_a_redirected_transfer_keeps_no_connection_to_the_last_encode_worker(make_pair: MakePair, shared: bool) -> None:
    """Otherwise a dead worker would be dialled for ever."""
    pair = make_pair(num_blocks=16)
    first, rows = pair.sending, embedding(100)
    receiver, other = pair.receiver(), pair.receiver()
    ends = [receiver, other] if shared else [receiver]
    for end in ends:
        end.init()
        pair.sender(end.room, rows, ready=16)
        until(lambda end=end: end.transferred_tokens == 16)  # type: ignore[misc]
    control = pair.receiving._runtime.control
    assert isinstance(control, SocketControl)
    assert control._dialled[first.endpoint].needed
    receiver.redirect(pair.sending.endpoint)  # to where it is: nothing changes
    let_turn(pair.receiving)
    assert control._dialled[first.endpoint].needed
    second = SendManager(LAYOUT, [pair.transport()], settings=first.settings)
    pair.extra.append(second)
    receiver.redirect(second.endpoint)
    pair.sending = second
    pair.extra.append(first)
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert control._dialled[first.endpoint].needed is shared


def test_a_peer_is_forgotten_before_what_is_sent_to_it_later() -> None:
    calls: list[str] = []
    control = Mock(send=lambda peer, data: calls.append("send"), forget=lambda peer: calls.append("forget"))
    messages = ControlMessages(control, lambda: 0.0)
    messages.queue("peer", 1, 2, Confirm(7, 8))
    messages.forget("peer")
    messages.queue("peer", 3, 4, Confirm(7, 9))
    messages.send()
    assert calls == ["send", "forget", "send"]


def test_an_endpoint_is_not_changed_before_the_embedding_was_asked_for(make_pair: MakePair) -> None:
    pair = make_pair()
    receiver = pair.receiver()
    with pytest.raises(LocalProtocolError, match="init"):
        receiver.redirect("tcp://127.0.0.1:1")
    assert receiver.endpoint == pair.sending.endpoint


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
