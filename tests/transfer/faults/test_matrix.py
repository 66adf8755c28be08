"""The fault matrix: wherever a fault strikes, it costs at most the transfer that it hits."""

from __future__ import annotations

import pytest

from embferry import wait
from embferry.protocol.errors import EmbeddingTransferError, shown

from ..conftest import SECONDS
from .fault import FAULTS, Fault, Trip
from .place import End, Place, Strikes
from .places import PLACES
from .scene import Scene, Transfer, make_scene, nothing_left_open


def ends(hit: Transfer, place: Place, fault: Fault, trip: Trip) -> None:
    """Waits for the end of the transfer that is hit, and checks how it ends."""
    if place.end is End.FAILS and fault.error is not None:
        with pytest.raises(EmbeddingTransferError) as caught:
            wait(hit.receiver, SECONDS)
        assert fault.text in str(caught.value)
        with pytest.raises(EmbeddingTransferError) as told:
            wait(hit.sender, SECONDS)
        assert fault.text in str(told.value)
        return
    hit.send()
    hit.arrives()


def close(scene: Scene, place: Place, fault: Fault) -> None:
    errors: list[Exception] = []
    for manager in scene.managers:
        try:
            manager.close()
        except ExceptionGroup as group:
            errors += group.exceptions
    if place.end is End.CLOSE_RAISES and fault.error is not None:
        assert [fault.text in shown(error) for error in errors] == [True]
        if place.name == "receiving transport.close":  # it may still write, so the region has stayed mapped
            scene.receiving.buffers.close()
    else:
        assert not errors


OF_OUTSIDE = ("CancelledError", "KeyboardInterrupt")
"""Exceptions that a machine, which calls no foreign code, cannot raise."""

CASES = [
    pytest.param(place, fault, id=f"{place.name}-{fault.name}")
    for place in PLACES
    for fault in FAULTS
    if not (place.is_machine and fault.name in OF_OUTSIDE)
]


@pytest.mark.parametrize(("place", "fault"), CASES)
def test_a_fault_costs_one_transfer(place: Place, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left_open():
        run(place, fault, monkeypatch)
        monkeypatch.undo()


def run(place: Place, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    trip = Trip(fault)
    scene = make_scene()
    scene.begin_others()
    hit = place.plant(scene, trip, monkeypatch)
    if place.strikes is Strikes.BEFORE_THE_END:
        assert trip.fired.wait(SECONDS)
    ends(hit, place, fault, trip)
    scene.finish_others()
    if place.end is End.CLEAR_RAISES and fault.error is not None:
        with pytest.raises(type(fault.error())):
            hit.receiver.clear()
    hit.clear()
    assert scene.pool_becomes_whole()
    if place.strikes is Strikes.AFTER_THE_END:
        assert trip.fired.wait(SECONDS)
    close(scene, place, fault)
    assert trip.fired.wait(SECONDS)
