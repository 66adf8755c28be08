"""The gate: how a receiver takes back blocks that NIXL lets others write to.

NIXL has no way to take leave back. Deregistering a region does not stop a write that has begun: where the network has
no keys of its own, UCX stores what arrives without looking whether the memory is still registered, and
``process_vm_writev`` and mapped memory never ask. Nor does a sender's death: what it left in a socket is stored
afterwards. So senders keep to a protocol, and the receiver knows at any time which writes are out.

*A sender*, for each write, asks. It writes only after the answer "go", and says "done" once the engine has reported
that every byte is in place and none is on its way. Between ask and done the write is a **lease**.

*The receiver*, to revoke: shuts the window, so that later asks are refused; tells the holders of its leases to stop;
and reports ``Revoked`` when the last of them is over. With no lease out that is at once. A lease is over

- when its holder says "done"; or
- when its holder's connection has ended **and** the agent that served that holder alone is destroyed: with it go the
  sockets, queues and keys through which a late byte could come. A holder on the same host can also write without our
  agent's help; but its connection ends only by its own hand, after its writes have ended, or with its process, and the
  kernel closes a process's sockets when the last of its threads has ceased to run. (A child that was forked off keeps
  the connection open, and holds the lease up; it cannot end it too early.)

Blocks whose writer has said on the control plane that it is done (``close_blocks``) may be admitted anew while its
"done" is still on the way here. Until that is in, an ask for the same blocks under another epoch waits.

No sockets, threads or clocks here: methods say what is to be sent. Any thread may call them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError

from ...contract import Region, Window
from ...windows import BlockRows, Ranges, Windows


@dataclass(frozen=True, eq=False, slots=True)
class Lease:
    """One write, from its ask on. ``serial`` is its holder's number for it."""

    holder: object
    serial: int
    epoch: int
    touched: npt.NDArray[np.intp]


@dataclass(slots=True)
class Outcome:
    """What follows from a change, in the order in which it must be carried out."""

    answers: list[tuple[Lease, bool]] = field(default_factory=list)
    stops: list[Lease] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Revocation:
    epoch: int
    blocks: frozenset[int]
    out: set[Lease]


class Gate:
    """The windows of a region and the leases on them."""

    def __init__(self, region: Region) -> None:
        self._rows = BlockRows(region.rows, region.num_blocks)
        self._windows = Windows(self._rows, np.zeros(region.num_blocks, np.uint64))
        self._lock = threading.Lock()
        self._out: dict[Lease, None] = {}
        self._waiting: dict[Lease, None] = {}
        self._revocations: list[_Revocation] = []

    def admit(self, window: Window) -> None:
        with self._lock:
            barred = frozenset[int]().union(*(revocation.blocks for revocation in self._revocations))
            if barred & set(window.blocks):
                raise LocalProtocolError(
                    f"blocks of the window of epoch {window.epoch} are being revoked; await Revoked"
                )
            self._windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> Outcome:
        with self._lock:
            self._windows.close_blocks(epoch, blocks)
            outcome = Outcome(stops=self._over_closed(epoch))
            self._decide(outcome)
        return outcome

    def revoke(self, epoch: int) -> Outcome:
        with self._lock:
            blocks = frozenset(self._windows.revoke(epoch))
            out = {lease for lease in self._out if lease.epoch == epoch}
            self._revocations.append(_Revocation(epoch, blocks, out))
            outcome = Outcome(stops=list(out))
            self._decide(outcome)
        return outcome

    def close_all(self) -> Outcome:
        with self._lock:
            self._windows.close_all()
            outcome = Outcome(stops=list(self._out))
            self._decide(outcome)
        return outcome

    def ask(self, holder: object, serial: int, epoch: int, ranges: Ranges) -> Outcome:
        touched = self._rows.touched(ranges)
        lease = Lease(holder, serial, epoch, np.zeros(0, np.intp) if touched is None else touched)
        with self._lock:
            self._waiting[lease] = None
            outcome = Outcome()
            self._decide(outcome)
        return outcome

    def done(self, holder: object, serial: int) -> Outcome | None:
        """None if there is no such lease."""
        with self._lock:
            found = [lease for lease in self._out if lease.holder is holder and lease.serial == serial]
            return self._end(found) if found else None

    def gone(self, holder: object) -> Outcome:
        """The holder's connection has ended and its agent is destroyed."""
        with self._lock:
            self._waiting = {lease: None for lease in self._waiting if lease.holder is not holder}
            return self._end([lease for lease in self._out if lease.holder is holder])

    def out(self) -> tuple[Lease, ...]:
        with self._lock:
            return tuple(self._out)

    # With the lock held.

    def _over_closed(self, epoch: int) -> list[Lease]:
        """Leases of ``epoch`` on blocks that are no longer its own."""
        return [lease for lease in self._out if lease.epoch == epoch and not self._windows.allows(epoch, lease.touched)]

    def _end(self, leases: Iterable[Lease]) -> Outcome:
        outcome = Outcome()
        for lease in leases:
            del self._out[lease]
            for revocation in self._revocations:
                revocation.out.discard(lease)
        self._decide(outcome)
        return outcome

    def _decide(self, outcome: Outcome) -> None:
        outcome.revoked += [revocation.epoch for revocation in self._revocations if not revocation.out]
        self._revocations = [revocation for revocation in self._revocations if revocation.out]
        for lease in list(self._waiting):
            allowed = self._windows.allows(lease.epoch, lease.touched)
            if allowed and any(self._in_the_way(other, lease) for other in self._out):
                continue
            del self._waiting[lease]
            if allowed:
                self._out[lease] = None
            outcome.answers.append((lease, allowed))

    @staticmethod
    def _in_the_way(other: Lease, lease: Lease) -> bool:
        return other.epoch != lease.epoch and np.intersect1d(other.touched, lease.touched, assume_unique=True).size > 0
