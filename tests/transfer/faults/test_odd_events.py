"""Transports that report events of other transfers, events twice, or errors of another kind."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from embferry import ReceiveManager, SendManager, wait
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, TransportError
from embferry.protocol.layout import Geometry
from embferry.transports.contract import Event, Revoked, Written
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.tcp.transport import TcpTransport

from ..conftest import LAYOUT, SECONDS, Pair, embedding, same
from .fault import Fault, Trip

Change = Callable[[list[Event]], Any]


class Odd(InMemoryTransport):
    """A transport whose events are changed on their way to the driver."""

    change: Change = staticmethod(lambda events: events)

    def poll(self) -> list[Event]:
        changed: list[Event] = self.change(super().poll())
        return changed


def fail_each(error: Any) -> Change:
    return lambda events: [Written(e.ticket, error) if isinstance(e, Written) else e for e in events]


CHANGES: dict[str, Change] = {
    "twice": lambda events: events * 2,
    "unknown ones": lambda events: [Written(1 << 40), Revoked(1 << 40), *events],
    "other objects": lambda events: [None, 7, "written", *events],
    "a wrong error": fail_each(RuntimeError("not an error of transports")),
    "no list": lambda events: None,
    "an exception class": fail_each(ValueError),
}


@pytest.mark.parametrize("end", ["receiving", "sending"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_transfer_arrives_whatever_its_first_transport_reports(name: str, end: str) -> None:
    odd = {"receiving": Odd(), "sending": Odd()}
    odd[end].change = CHANGES[name]  # type: ignore[method-assign]
    receiving = ReceiveManager(Geometry(LAYOUT, 2, 16), [odd["receiving"], TcpTransport()])
    pair = Pair(receiving, SendManager(LAYOUT, [odd["sending"], TcpTransport()]), Odd)
    rows = embedding(100)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    receiver.clear()
    for manager in (pair.sending, pair.receiving):
        assert manager.fault is None
        manager.close()


def test_without_another_transport_the_error_is_told() -> None:
    odd = Odd()
    odd.change = CHANGES["a wrong error"]  # type: ignore[method-assign]
    pair = Pair(ReceiveManager(Geometry(LAYOUT, 2, 16), [Odd()]), SendManager(LAYOUT, [odd]), Odd)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, embedding(100))
    with pytest.raises(TransportError, match="not an error of transports"):
        wait(receiver, SECONDS)
    pair.sending.close()
    pair.receiving.close()


@pytest.mark.parametrize("name", ["connect_to_sender", "admit"])
def test_a_transport_that_cannot_admit_ends_a_transfer_only_if_there_is_no_other(name: str) -> None:
    """The cause is told to both ends. The receiving end has another transport, but the sending end does not."""
    odd = Odd()
    receiving = ReceiveManager(Geometry(LAYOUT, 2, 16), [odd, TcpTransport()])
    pair = Pair(receiving, SendManager(LAYOUT, [Odd()]), Odd)

    def refuse(_: object) -> None:
        raise OSError(errno.EMFILE, "no descriptors are left")

    setattr(odd, name, refuse)
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(100))
    for end in (receiver, sender):
        with pytest.raises(EmbeddingTransferError, match="no descriptors are left"):
            wait(end, SECONDS)
    receiver.clear()
    for manager in (pair.sending, pair.receiving):
        assert manager.fault is None
        manager.close()


@pytest.mark.parametrize("order", ["the sender first", "the receiver first"])
def test_a_receiver_that_breaks_before_its_first_message_tells_its_peer(order: str) -> None:
    """Also a peer that is there only later, for as long as the receiver lingers."""
    pair = Pair(ReceiveManager(Geometry(LAYOUT, 2, 16), [Odd()]), SendManager(LAYOUT, [Odd()]), Odd)
    receiver = pair.receiver()
    sender = pair.sending.open(receiver.room) if order == "the sender first" else None
    with pair.receiving.lock:
        receiver.init()
        trip = Trip(Fault("RuntimeError", lambda: RuntimeError("a bug")))
        trip.plant(receiver.machine, "take_commands")
    with pytest.raises(LocalProtocolError, match="a bug"):
        wait(receiver, SECONDS)
    sender = sender or pair.sending.open(receiver.room)
    with pytest.raises(LocalProtocolError, match="a bug"):
        wait(sender, pair.sending.settings.bootstrap_timeout / 2)
    receiver.clear()
    pair.sending.close()
    pair.receiving.close()
