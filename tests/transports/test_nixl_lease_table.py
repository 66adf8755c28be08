"""What the gate of the ``nixl`` transport promises, without an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError
from embferry.testing.pair import SMALL, block_ranges
from embferry.transports.contract import Window
from embferry.transports.leased.nixl.gate import Gate, Outcome
from embferry.transports.windows import as_ranges

A, B = "one sender", "another"


@pytest.fixture
def gate() -> Iterator[Gate]:
    region = MultimodalDataBuffers(SMALL, shared=False)
    yield Gate(region)
    region.close()


def admit(gate: Gate, epoch: int, *blocks: int) -> None:
    gate.admit(Window(epoch, blocks))


def ask(gate: Gate, holder: str, serial: int, epoch: int, *blocks: int) -> Outcome:
    return gate.ask(holder, serial, epoch, as_ranges(block_ranges(SMALL, blocks)))


def answers(outcome: Outcome | None) -> list[tuple[object, int, bool]]:
    assert outcome is not None
    return [(lease.holder, lease.serial, go) for lease, go in outcome.answers]


def stops(outcome: Outcome) -> list[tuple[object, int]]:
    return sorted((str(lease.holder), lease.serial) for lease in outcome.stops)


def test_asks_are_answered_by_the_windows(gate: Gate) -> None:
    admit(gate, 1, 0, 1)
    assert answers(ask(gate, A, 0, 1, 0, 1)) == [(A, 0, True)]
    assert answers(ask(gate, B, 0, 1, 1)) == [(B, 0, True)], "two writes of one window"
    assert answers(ask(gate, A, 1, 1, 1, 2)) == [(A, 1, False)]
    assert answers(ask(gate, A, 2, 2, 0)) == [(A, 2, False)]
    assert answers(gate.ask(A, 3, 1, as_ranges([((1 << 64) - 1, 1)]))) == [(A, 3, False)]
    assert len(gate.out()) == 2


def test_revoking_without_a_lease_is_true_at_once(gate: Gate) -> None:
    admit(gate, 1, 0)
    ask(gate, A, 0, 1, 0)
    gate.done(A, 0)
    assert gate.revoke(1) == Outcome(revoked=[1])
    assert gate.revoke(7) == Outcome(revoked=[7])
    assert answers(ask(gate, A, 1, 1, 0)) == [(A, 1, False)]


def test_revoking_waits_for_every_lease(gate: Gate) -> None:
    admit(gate, 1, 0, 1)
    admit(gate, 2, 2)
    ask(gate, A, 0, 1, 0)
    ask(gate, B, 0, 1, 1)
    ask(gate, B, 1, 2, 2)
    outcome = gate.revoke(1)
    assert stops(outcome) == sorted([(A, 0), (B, 0)])
    assert outcome.revoked == []
    with pytest.raises(LocalProtocolError):
        admit(gate, 3, 1)
    assert gate.revoke(1).revoked == []
    assert gate.done(A, 0) == Outcome()
    assert gate.gone(B) == Outcome(revoked=[1, 1])
    assert gate.out() == ()
    admit(gate, 3, 1)


def test_a_lease_of_closed_blocks_holds_up_only_others_on_them(gate: Gate) -> None:
    admit(gate, 1, 0, 1)
    ask(gate, A, 0, 1, 0)
    assert stops(gate.close_blocks(1, (0,))) == [(A, 0)]
    admit(gate, 2, 0, 2)
    assert answers(ask(gate, B, 0, 2, 0)) == []
    assert answers(ask(gate, B, 1, 2, 2)) == [(B, 1, True)]
    assert answers(gate.done(A, 0)) == [(B, 0, True)]


def test_a_waiting_ask_is_refused_when_its_window_closes(gate: Gate) -> None:
    admit(gate, 1, 0)
    ask(gate, A, 0, 1, 0)
    gate.close_blocks(1, (0,))
    admit(gate, 2, 0)
    assert answers(ask(gate, B, 0, 2, 0)) == []
    outcome = gate.revoke(2)
    assert answers(outcome) == [(B, 0, False)]
    assert outcome.revoked == [2]


def test_a_waiting_ask_goes_with_its_holder(gate: Gate) -> None:
    admit(gate, 1, 0)
    ask(gate, A, 0, 1, 0)
    gate.close_blocks(1, (0,))
    admit(gate, 2, 0)
    ask(gate, B, 0, 2, 0)
    assert gate.gone(B) == Outcome()
    assert gate.done(A, 0) == Outcome()
    assert gate.out() == ()


def test_closing_all_stops_everybody(gate: Gate) -> None:
    admit(gate, 1, 0)
    ask(gate, A, 0, 1, 0)
    assert stops(gate.close_all()) == [(A, 0)]
    assert len(gate.out()) == 1
    assert answers(ask(gate, A, 1, 1, 0)) == [(A, 1, False)]


def test_done_with_what_is_not_out(gate: Gate) -> None:
    admit(gate, 1, 0)
    ask(gate, A, 0, 1, 0)
    assert gate.done(B, 0) is None
    assert gate.done(A, 1) is None
    assert gate.done(A, 0) == Outcome()
    assert gate.done(A, 0) is None
