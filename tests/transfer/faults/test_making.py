"""A manager that cannot be made closes everything that it was given and has opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from embferry import ReceiveManager, SendManager
from embferry.protocol.errors import EmbeddingTransferError, shown
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transfer import receive_manager, runtime, send_manager
from embferry.transports.contract import Transport
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport

from ..conftest import LAYOUT
from .fault import FAULTS, Fault, Trip
from .scene import nothing_left_open


def receives(transports: list[Transport]) -> ReceiveManager:
    return ReceiveManager(Geometry(LAYOUT, 8, 16), transports)


def sends(transports: list[Transport]) -> SendManager:
    return SendManager(LAYOUT, transports)


PLACES: dict[str, tuple[Callable[[list[Transport]], Any], Any, str]] = {
    "register": (receives, HttpTransport, "register"),
    "the pool": (receives, receive_manager, "MultimodalDataBuffers"),
    "the receiver's control plane": (receives, receive_manager, "SocketControl"),
    "the sender's control plane": (sends, send_manager, "SocketControl"),
    "the receiver's thread": (receives, runtime.ThreadRuntime, "start"),
    "the sender's thread": (sends, runtime.ThreadRuntime, "start"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_while_a_manager_is_made_leaves_nothing_open(
    place: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, owner, name = PLACES[place]
    trip = Trip(fault)
    monkeypatch.setattr(owner, name, trip.before(getattr(owner, name)))
    with nothing_left_open():
        _make(make, fault)
    assert trip.fired.is_set()


def _make(make: Callable[[list[Transport]], Any], fault: Fault) -> None:
    transports: list[Transport] = [TcpTransport(), ShmTransport(), InMemoryTransport(), HttpTransport()]
    if fault.error is None:
        make(transports).close()
        return
    with pytest.raises(type(fault.error())) as caught:
        make(transports)
    assert fault.text in shown(caught.value)


def test_a_layout_that_is_out_of_bounds_leaves_nothing_open() -> None:
    layout = Layout((Field("x", "int32", 1),) * 2)
    for make in (
        lambda transports: SendManager(layout, transports),
        lambda transports: ReceiveManager(Geometry(layout, 8, 16), transports),
    ):
        with nothing_left_open():
            _make_of(make)


def _make_of(make: Callable[[list[Transport]], Any]) -> None:
    with pytest.raises(EmbeddingTransferError):
        make([TcpTransport(), ShmTransport()])
