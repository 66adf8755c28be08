"""Faults of a stream of bytes, without sockets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from embferry.testing.stream_faults import Action, Fault, FaultInjector, FaultyStream, Kind

DATA = b"0123456789"


def pieces(cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *cuts, len(DATA)]
    return [DATA[a:b] for a, b in itertools.pairwise(edges)]


def through(stream: FaultyStream, *data: bytes) -> list[bytes | Action]:
    steps = [step for piece in data for step in stream.feed(piece)]
    return [*steps, stream.end()]


def joined(steps: list[bytes | Action]) -> bytes:
    return b"".join(step for step in steps if isinstance(step, bytes))


@pytest.mark.parametrize("cuts", [(), (3,), (4,), (1, 4, 5, 6), tuple(range(1, 10))], ids=str)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("flip", at=3, bit=2), b"0127456789"),
        (Fault("duplicate", at=3, length=2), b"012343456789"),
        (Fault("drop", at=3, length=2), b"01256789"),
        (Fault("reorder", at=3, length=2), b"0125634789"),
        (Fault("reorder", at=7, length=2), b"0123456789"),
        (Fault("swallow", at=3), b"012"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_the_bytes_do_not_depend_on_the_pieces_in_which_they_come(
    fault: Fault, expected: bytes, cuts: tuple[int, ...]
) -> None:
    injector = FaultInjector()
    injector.arm(fault)
    assert joined(through(FaultyStream(injector, "upstream"), *pieces(cuts))) == expected
    assert injector.struck.is_set()


@pytest.mark.parametrize("kind", ["cut", "reset", "stall", "delay"])
def test_actions_come_at_the_byte(kind: Kind) -> None:
    injector = FaultInjector()
    injector.arm(Fault(kind, at=3, seconds=0.5))
    stream = FaultyStream(injector, "upstream")
    assert next(stream.feed(DATA)) == b"012"
    stream = FaultyStream(injector, "upstream")
    injector.arm(Fault(kind, at=3, seconds=0.5))
    steps = list(stream.feed(DATA))
    assert steps[0] == b"012"
    assert isinstance(steps[1], Action)
    assert steps[1].kind == kind
    assert steps[2:] == ([b"3456789"] if kind in ("stall", "delay") else [])


def test_each_connection_counts_its_own_bytes_and_one_is_struck() -> None:
    injector = FaultInjector()
    first, second, other = (FaultyStream(injector, toward) for toward in ("upstream", "upstream", "clients"))
    assert joined(through(first, b"before")) == b"before"
    injector.arm(Fault("flip", at=4))
    assert joined(through(first, b"abcd")) == b"abcd"
    assert joined(through(second, b"abcd")) == b"abcd"
    assert joined(through(other, b"abcdefgh")) == b"abcdefgh"
    assert not injector.struck.is_set()
    assert joined(through(second, b"fg")) == b"gg"
    assert injector.struck.is_set()
    assert joined(through(first, b"fg")) == b"fg"


def test_a_fault_ends_with_its_disarming() -> None:
    injector = FaultInjector()
    injector.arm(Fault("swallow"))
    stream = FaultyStream(injector, "upstream")
    assert joined(through(stream, b"lost")) == b""
    injector.disarm()
    assert joined(through(stream, b"kept")) == b"kept"
    injector.arm(Fault("reorder", length=100))
    assert list(stream.feed(b"held")) == []
    injector.disarm()
    assert joined(through(stream, b" back")) == b"held back"


def test_a_stall_lasts_until_the_fault_is_disarmed_or_replaced() -> None:
    injector = FaultInjector()
    injector.arm(Fault("stall"))
    assert not injector.released.is_set()
    injector.disarm()
    assert injector.released.is_set()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("flip", b"acbccc"), ("duplicate", b"abbbbccc"), ("drop", b"accc"), ("reorder", b"acccbb")],
)
def test_whole_messages(kind: Kind, expected: bytes) -> None:
    def split(data: bytes) -> list[bytes]:
        return data.split(b" ")

    injector = FaultInjector()
    injector.arm(Fault(kind, at=1, messages=True, bit=0))
    assert joined(through(FaultyStream(injector, "upstream", split), b"a bb ccc")) == expected
