"""The fuzzer with fixed seeds: 100,000 inputs in all. ``make fuzz N=…`` runs others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from embferry.protocol import guards
from embferry.transfer.control import framing
from embferry.transports.receive_region import Permit

from .engine import Input, Target, draw, failure, failure_of_pieces, failure_of_seed
from .found import FOUND
from .measure import Bounds, ExcessError, excess_of_calls, excess_of_memory
from .raw import Pieces
from .shrink import kind, shrink
from .targets import TARGETS

INPUTS = 100_000
EACH = 1000


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Formats no log lines: thousands of inputs are refused, and each refusal is logged."""
    before = logging.root.manager.disable
    logging.disable()
    yield
    logging.disable(before)


def parts() -> list[tuple[str, int]]:
    return [(name, first) for name, target in TARGETS.items() for first in range(0, target.inputs, EACH)]


@pytest.mark.parametrize(("name", "first"), parts())
def test_every_input_is_handled_as_documented(name: str, first: int) -> None:
    target = TARGETS[name]
    for seed in range(first, min(first + EACH, target.inputs)):
        error = failure_of_seed(target, seed)
        if error is not None:
            pytest.fail(
                f"seed {seed}: {error!r}\nmake fuzz TARGET={name} FIRST={seed} N=1 finds the smallest such input"
            )


def test_the_set_has_a_hundred_thousand_inputs() -> None:
    assert sum(target.inputs for target in TARGETS.values()) >= INPUTS


@pytest.mark.parametrize("name", FOUND)
def test_an_input_that_showed_a_fault_is_handled(name: str) -> None:
    target, pieces = FOUND[name]
    assert failure_of_pieces(TARGETS[target], pieces) is None


@pytest.mark.parametrize("name", TARGETS)
def test_a_seed_makes_the_same_input_again(name: str) -> None:
    assert [draw(TARGETS[name], seed) for seed in range(50)] == [draw(TARGETS[name], seed) for seed in range(50)]


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_get_past_the_first_check_and_are_refused_too(name: str) -> None:
    """A generator whose inputs are all refused, or all accepted, tests little. The machines accept every message."""
    target = TARGETS[name]
    accepted = [_is_accepted(target, draw(target, seed)) for seed in range(min(300, target.inputs))]
    assert sum(accepted) > len(accepted) / 10
    assert not all(accepted) or not target.documented


def _is_accepted(target: Target, given: Input) -> bool:
    try:
        target.run(given.pieces)
    except target.documented:
        return False
    return True


# The fuzzer finds what it is for


MUTANTS: dict[str, tuple[str, object, str, Any]] = {
    "a frame is not checked": ("control_stream", framing, "check", lambda payload: 0),
    "a window is not checked": ("tcp", Permit, "holds", lambda permit: not permit.refused),
    "a chunk is taken twice": ("receiver_machine", guards, "is_first_report", lambda *_: True),
    "damaged tokens count": ("receiver_machine", guards, "may_count", lambda *_: True),
    "a repeated grant is written again": ("sender_machine", guards, "is_new", lambda *_: True),
    "a drained grant is written": ("sender_machine", guards, "may_take_up", lambda *_: True),
}
"""A rule that is removed, and the target that must find it: target, owner, name, replacement."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_missing_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, owner, rule, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, rule, replacement)
    assert any(failure_of_seed(TARGETS[target], seed) is not None for seed in range(1000))


class Echo(Target):
    """Takes work and memory by the first byte, and fails if a piece holds both an A and a B."""

    documented = (ValueError,)

    def tree(self, chance: Any) -> Any:
        return [b"AB"]

    def encode(self, tree: Any, chance: Any) -> Pieces:
        return [b"AB"]

    def run(self, pieces: Pieces) -> object:
        data = b"".join(pieces)
        if b"A" in data and b"B" in data:
            raise AssertionError("both")
        if data[:1] == b"w":
            return [len(data) for _ in range(100_000)]
        return bytearray(1 << 20) if data[:1] == b"m" else None


def test_the_smallest_input_is_found() -> None:
    pieces = [b"xx", b"some bytes, an A, then others, and at last a B, then more", b"yy"]
    like = kind(failure(Echo(), Input(pieces)) or Exception())
    small = shrink(pieces, lambda p: (e := failure(Echo(), Input(p))) is not None and kind(e) == like)
    assert small == [b"AB"]


def test_work_and_memory_out_of_proportion_are_found() -> None:
    assert isinstance(failure_of_pieces(Echo(), [b"w"]), ExcessError)
    assert isinstance(failure_of_pieces(Echo(), [b"m"]), ExcessError)
    assert failure_of_pieces(Echo(), [b"-"]) is None


def test_bounds_grow_with_the_input() -> None:
    bounds = Bounds(calls=10, calls_per_byte=1, memory=100, memory_per_byte=1000)
    assert excess_of_calls(lambda: [len("") for _ in range(50)], [bytes(9)], bounds) is not None
    assert excess_of_calls(lambda: [len("") for _ in range(50)], [bytes(90)], bounds) is None
    assert excess_of_memory(lambda: bytearray(50_000), [bytes(9)], bounds) is not None
    assert excess_of_memory(lambda: bytearray(50_000), [bytes(90)], bounds) is None
