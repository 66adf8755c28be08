"""The lease table, without an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError
from embferry.testing.pair import SMALL, block_ranges
from embferry.transports.contract import Window
from embferry.transports.leased.leases import MAX_LEASES, LeaseTable, Outcome
from embferry.transports.windows import as_ranges

A, B = "one sender", "another"
BASE, STEP = 1 << 20, 1 << 16


@pytest.fixture
def region() -> Iterator[MultimodalDataBuffers]:
    region = MultimodalDataBuffers(SMALL, shared=False)
    yield region
    region.close()


@pytest.fixture
def table(region: MultimodalDataBuffers) -> LeaseTable:
    """As for NIXL: an engine that is cut off from one sender at a time, when its connection has ended."""
    return LeaseTable(region, BASE)


class Cutter:
    """Counts how often the engine has been cut off; the region moves to another address each time."""

    def __init__(self, region: MultimodalDataBuffers) -> None:
        self.count = 0
        self.error: OSError | None = None
        self.table = LeaseTable(region, BASE, self._cut_off)

    def _cut_off(self) -> int:
        if self.error is not None:
            raise self.error
        self.count += 1
        return BASE + self.count * STEP


@pytest.fixture
def cutter(region: MultimodalDataBuffers) -> Cutter:
    """As for Mooncake: an engine that can be cut off from all senders at any moment."""
    return Cutter(region)


def admit(table: LeaseTable, epoch: int, *blocks: int) -> None:
    table.admit(Window(epoch, blocks))


def ask(table: LeaseTable, holder: str, serial: int, epoch: int, *blocks: int) -> Outcome:
    outcome = table.ask(holder, serial, epoch, as_ranges(block_ranges(SMALL, blocks)))
    assert outcome is not None
    return outcome


def verdicts(outcome: Outcome | None) -> list[tuple[object, int, bool]]:
    assert outcome is not None
    return [(lease.holder, lease.serial, go) for lease, go in outcome.verdicts]


def stops(outcome: Outcome | None) -> list[tuple[object, int]]:
    assert outcome is not None
    return sorted((str(lease.holder), lease.serial) for lease in outcome.stops)


def done(table: LeaseTable, holder: str, serial: int, *, clean: bool = True) -> tuple[Outcome, bool]:
    """Ends a write. Returns the outcome, and whether the window of the write is still open."""
    outcome = table.done(holder, serial, clean=clean)
    assert outcome is not None
    ((lease, window_open),) = outcome.acknowledged
    assert (lease.holder, lease.serial) == (holder, serial)
    return outcome, window_open


def test_the_open_windows_decide(table: LeaseTable) -> None:
    admit(table, 1, 0, 1)
    assert verdicts(ask(table, A, 0, 1, 0, 1)) == [(A, 0, True)]
    assert verdicts(ask(table, B, 0, 1, 1)) == [(B, 0, True)], "two writes of one window"
    assert verdicts(ask(table, A, 1, 1, 1, 2)) == [(A, 1, False)]
    assert verdicts(ask(table, A, 2, 2, 0)) == [(A, 2, False)]
    assert verdicts(table.ask(A, 3, 1, as_ranges([((1 << 64) - 1, 1)]))) == [(A, 3, False)]
    assert len(table.out()) == 2


def test_a_revocation_without_a_lease_is_complete_at_once(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    done(table, A, 0)
    assert table.revoke(1) == Outcome(revoked=[1])
    assert table.revoke(7) == Outcome(revoked=[7])
    assert verdicts(ask(table, A, 1, 1, 0)) == [(A, 1, False)]


def test_a_revocation_waits_for_every_lease(table: LeaseTable) -> None:
    admit(table, 1, 0, 1)
    admit(table, 2, 2)
    ask(table, A, 0, 1, 0)
    ask(table, B, 0, 1, 1)
    ask(table, B, 1, 2, 2)
    outcome = table.revoke(1)
    assert stops(outcome) == sorted([(A, 0), (B, 0)])
    assert outcome.revoked == []
    with pytest.raises(LocalProtocolError):
        admit(table, 3, 1)
    assert table.revoke(1).revoked == []
    ended, window_open = done(table, A, 0)
    assert not window_open
    assert ended.revoked == []
    assert table.lost(B) == Outcome(), "its agent may still deliver bytes"
    assert len(table.out()) == 2
    assert table.ended(B) == Outcome(revoked=[1, 1])
    assert table.out() == ()
    admit(table, 3, 1)


def test_a_failed_write_holds_a_revocation_up_until_its_holder_is_cut_off(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    assert done(table, A, 0, clean=False)[1], "the window is still open"
    assert table.revoke(1).revoked == []
    assert table.lost(A).revoked == []
    assert table.ended(A).revoked == [1]


def test_a_lease_on_closed_blocks_delays_only_asks_for_them(table: LeaseTable) -> None:
    admit(table, 1, 0, 1)
    ask(table, A, 0, 1, 0)
    assert stops(table.close_blocks(1, (0,))) == [(A, 0)]
    admit(table, 2, 0, 2)
    assert verdicts(ask(table, B, 0, 2, 0)) == []
    assert verdicts(ask(table, B, 1, 2, 2)) == [(B, 1, True)]
    assert verdicts(done(table, A, 0)[0]) == [(B, 0, True)]


def test_a_waiting_ask_is_refused_when_its_window_closes(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    table.close_blocks(1, (0,))
    admit(table, 2, 0)
    assert verdicts(ask(table, B, 0, 2, 0)) == []
    assert table.done(B, 0) is None, "it has no lease yet"
    outcome = table.revoke(2)
    assert verdicts(outcome) == [(B, 0, False)]
    assert outcome.revoked == [2]


def test_a_waiting_ask_is_dropped_with_its_holder(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    table.close_blocks(1, (0,))
    admit(table, 2, 0)
    ask(table, B, 0, 2, 0)
    assert table.lost(B) == Outcome()
    assert table.ended(B) == Outcome()
    assert verdicts(done(table, A, 0)[0]) == []
    assert table.out() == ()


def test_closing_all_stops_every_holder(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    assert stops(table.close_all()) == [(A, 0)]
    assert len(table.out()) == 1
    assert verdicts(ask(table, A, 1, 1, 0)) == [(A, 1, False)]


def test_done_without_a_lease_is_noticed(table: LeaseTable) -> None:
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    ask(table, A, 2, 1, 5)
    assert table.done(B, 0) is None
    assert table.done(A, 1) is None
    assert table.done(A, 2) is None, "it was refused"
    done(table, A, 0)
    assert table.done(A, 0) is None


def test_a_serial_is_used_once_at_a_time_and_asks_are_bounded(table: LeaseTable) -> None:
    admit(table, 1, 0)
    nothing = as_ranges(block_ranges(SMALL, (0,)))
    for serial in range(MAX_LEASES):
        ask(table, A, serial, 1, 0)
    assert table.ask(A, MAX_LEASES, 1, nothing) is None
    done(table, A, 3)
    assert table.ask(A, 4, 1, nothing) is None
    ask(table, A, 3, 1, 0)
    assert len(table.out()) == MAX_LEASES


# An engine that can be cut off


def test_a_lease_in_doubt_is_cut_off_when_it_is_in_the_way(cutter: Cutter) -> None:
    table = cutter.table
    admit(table, 1, 0)
    admit(table, 2, 1)
    ask(table, A, 0, 1, 0)
    (lease,) = table.out()
    assert lease.base == BASE
    ask(table, B, 0, 2, 1)
    table.lost(A)
    assert cutter.count == 0, "nothing needs its blocks yet"
    outcome = table.revoke(1)
    assert outcome.revoked == [1]
    assert (B, 0) in stops(outcome), "its write will fail"
    assert (cutter.count, table.out()) == (1, ())
    assert done(table, B, 0, clean=False)[1], "so it can be repeated"
    ask(table, B, 1, 2, 1)
    (lease,) = table.out()
    assert lease.base == BASE + STEP


@pytest.mark.parametrize("how", ["its connection ends", "its write fails", "its time is up"])
def test_a_pending_revocation_ends_when_a_lease_comes_into_doubt(cutter: Cutter, how: str) -> None:
    table = cutter.table
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    assert stops(table.revoke(1)) == [(A, 0)]
    assert cutter.count == 0
    if how == "its connection ends":
        outcome = table.lost(A)
    elif how == "its write fails":
        outcome, window_open = done(table, A, 0, clean=False)
        assert not window_open
    else:
        outcome = table.expire(1)
        assert not done(table, A, 0)[1]
    assert (outcome.revoked, cutter.count) == ([1], 1)
    assert table.expire(1) == Outcome()
    assert cutter.count == 1, "there is nothing to wait for"
    admit(table, 2, 0)


def test_closing_blocks_cuts_off_what_is_not_done_with_them(cutter: Cutter) -> None:
    table = cutter.table
    admit(table, 1, 0, 1)
    ask(table, A, 0, 1, 0)
    table.close_blocks(1, (1,))
    assert cutter.count == 0
    table.close_blocks(1, (0,))
    assert (cutter.count, table.out()) == (1, ())
    admit(table, 2, 0)
    assert verdicts(ask(table, B, 0, 2, 0)) == [(B, 0, True)]


def test_blocks_from_which_a_writer_could_not_be_cut_off_are_not_admitted(cutter: Cutter) -> None:
    admit(cutter.table, 1, 0)
    ask(cutter.table, A, 0, 1, 0)
    cutter.error = OSError("no room")
    with pytest.raises(OSError, match="no room"):
        cutter.table.close_blocks(1, (0,))
    with pytest.raises(LocalProtocolError):
        admit(cutter.table, 2, 0)


def test_revocations_that_are_pending_at_the_end_are_completed(cutter: Cutter) -> None:
    table = cutter.table
    admit(table, 1, 0)
    ask(table, A, 0, 1, 0)
    table.revoke(1)
    assert table.close_all().revoked == []
    assert table.lost(A).revoked == []
    assert table.expire(1).revoked == []
    assert cutter.count == 0, "the owner of the region does it"
    assert table.end_all().revoked == [1]
