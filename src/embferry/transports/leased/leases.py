"""The lease table: how a receiver takes back blocks that another process writes one-sidedly.

NIXL and Mooncake write to any address that is registered when a write begins. Neither can revoke: memory that is
deregistered while a write is under way is written to the end. Nor does the death of a sender end its writes: what it
left in a socket is stored afterwards. So senders follow a protocol, and the receiver knows at any time which writes
may still change a byte.

*A sender* asks before each write. It writes only after the verdict "go", and says "done" once its engine has reported
that every byte is in place and none is in flight. Between verdict and "done" the write holds a **lease**.

*The receiver*, to revoke, closes the window, so that later asks are refused; tells the holders of its leases to stop;
and reports ``Revoked`` when the last of these leases has ended. Without a lease that is at once. A lease ends

- when its holder says "done"; or
- when the engine that could still deliver its bytes has been **cut off** from the region.

A lease is **in doubt** when its holder's connection has ended or its write has failed: bytes of it may be in flight,
and only cutting off ends it. The engines differ in how that is done:

- NIXL serves each holder by an agent of its own, and destroys that agent when the connection has ended
  (:mod:`.nixl.receiving_end`). The leases of that holder then end, by :meth:`LeaseTable.ended`.
- Mooncake writes through a second mapping of the region, which can be replaced at any moment (:mod:`.mooncake.alias`).
  That ends all leases of all holders, so it is done only if it must be: a lease in doubt is in the way of a
  revocation, a revocation has waited for its grace period, or blocks are closed while a lease is on them. Writes of
  others that were under way then fail visibly and are repeated. The table calls ``cut_off`` to do it.

Blocks whose writer has said on the control plane that it is done (``close_blocks``) may be admitted again while its
"done" is still on the way here. Until that has arrived, an ask for the same blocks under another epoch waits.

There are no sockets here: methods return what is to be sent. Any thread may call them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError

from ..contract import Region, Window
from ..windows import BlockRows, Ranges, Windows

MAX_LEASES = 256
"""Asks and leases of one holder at a time. Our own senders stay below it."""


@dataclass(eq=False, slots=True)
class Lease:
    """One write of one holder, from its ask on.

    Attributes:
        serial: The holder's number for the write.
        touched: Indices of the blocks it writes to, ascending; empty if it leaves the fields of the region.
        base: Address of the region that the lease was granted for.
        in_doubt: Bytes of it may be in flight although its holder writes no more.
    """

    holder: object
    serial: int
    epoch: int
    touched: npt.NDArray[np.intp]
    base: int = 0
    in_doubt: bool = False


@dataclass(slots=True)
class Outcome:
    """The consequences of a change, in the order in which they must be carried out.

    Attributes:
        verdicts: Asks that are decided, each with whether the lease is granted.
        stops: Leases whose holders must be told to stop.
        acknowledged: Writes that are over, each with whether its window is still open.
        revoked: Epochs whose revocation is complete.
    """

    verdicts: list[tuple[Lease, bool]] = field(default_factory=list)
    stops: list[Lease] = field(default_factory=list)
    acknowledged: list[tuple[Lease, bool]] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)


class LeaseTable:
    """The windows of a region and the leases on them. Thread-safe.

    Args:
        base: Address of the region, as engines of other processes name it.
        cut_off: Ends the access of every engine and returns the address at which the region is reached from then on.
            Called with the table's lock held, on the thread whose call made it necessary; what it raises is raised
            there. None if the engine has no such operation; leases in doubt then end by :meth:`ended` alone.
    """

    def __init__(self, region: Region, base: int, cut_off: Callable[[], int] | None = None) -> None:
        self._rows = BlockRows(region.rows, region.num_blocks)
        self._windows = Windows(self._rows, np.zeros(region.num_blocks, np.uint64))
        self._lock = threading.Condition(threading.Lock())  # notified when leases have ended
        self.base = base
        self._cut_off = cut_off
        self._asked: dict[object, dict[int, Lease]] = {}  # by holder and serial, until "done" or the holder's end
        self._waiting: dict[Lease, None] = {}
        self._out: dict[Lease, None] = {}
        self._revocations: list[tuple[int, tuple[int, ...], set[Lease]]] = []  # epoch, blocks, leases in the way

    # The receiver's driver

    def admit(self, window: Window) -> None:
        with self._lock:
            barred = set[int]().union(*(blocks for _, blocks, _ in self._revocations))
            if self._cut_off is not None:  # then a lease of another epoch is left only if cutting off has failed
                barred.update(*(lease.touched.tolist() for lease in self._out if lease.epoch != window.epoch))
            if not barred.isdisjoint(window.blocks):
                text = f"blocks of the window of epoch {window.epoch} are being revoked; await Revoked"
                raise LocalProtocolError(text)
            self._windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> Outcome:
        with self._lock:
            self._windows.close_blocks(epoch, blocks)
            stops = [lease for lease in self._out if lease.epoch == epoch and np.isin(lease.touched, blocks).any()]
            return self._settle(Outcome(stops=stops), cut_off=bool(stops))

    def revoke(self, epoch: int) -> Outcome:
        with self._lock:
            leases = [lease for lease in self._out if lease.epoch == epoch]
            self._revocations.append((epoch, self._windows.revoke(epoch), set(leases)))
            return self._settle(Outcome(stops=leases))

    def expire(self, epoch: int) -> Outcome:
        """Ends the grace period of a revocation of ``epoch``."""
        with self._lock:
            return self._settle(Outcome(), cut_off=any(revoked == epoch for revoked, _, _ in self._revocations))

    def close_all(self) -> Outcome:
        """Closes every window for good. ``cut_off`` is not called any more."""
        with self._lock:
            self._cut_off = None
            self._windows.close_all()
            return self._settle(Outcome(stops=list(self._out)))

    def end_all(self) -> Outcome:
        """Ends every lease: no engine can reach the region any more."""
        with self._lock:
            self._discard(list(self._out))
            return self._settle(Outcome())

    def out(self, timeout_s: float = 0.0) -> tuple[Lease, ...]:
        """Returns the leases that have not ended, after waiting for their end for at most ``timeout_s``."""
        with self._lock:
            self._lock.wait_for(lambda: not self._out, timeout_s)
            return tuple(self._out)

    def holds_any(self, holder: object) -> bool:
        """Returns whether a holder has an ask or a lease."""
        with self._lock:
            return bool(self._asked.get(holder)) or any(lease.holder is holder for lease in self._out)

    # The senders

    def ask(self, holder: object, serial: int, epoch: int, ranges: Ranges) -> Outcome | None:
        """Decides an ask, or keeps it waiting. Returns None if its serial is in use or the holder has too many."""
        touched = self._rows.touched(ranges)
        lease = Lease(holder, serial, epoch, np.zeros(0, np.intp) if touched is None else touched)
        with self._lock:
            asked = self._asked.setdefault(holder, {})
            if serial in asked or len(asked) >= MAX_LEASES:
                return None
            asked[serial] = lease
            self._waiting[lease] = None
            return self._settle(Outcome())

    def done(self, holder: object, serial: int, *, clean: bool = True) -> Outcome | None:
        """Ends a write; unless it is ``clean`` its lease is in doubt. Returns None if there is no such lease.

        A holder that was cut off says "done" as well, although its lease has ended.
        """
        with self._lock:
            asked = self._asked.get(holder, {})
            lease = asked.get(serial)
            if lease is None or lease in self._waiting:
                return None
            del asked[serial]
            if clean:
                self._discard([lease])
            lease.in_doubt = not clean
            outcome = self._settle(Outcome())
            outcome.acknowledged.append((lease, self._windows.allows(lease.epoch, lease.touched)))
            return outcome

    def lost(self, holder: object) -> Outcome:
        """Drops the asks of a holder whose connection has ended; its leases are in doubt."""
        with self._lock:
            for lease in self._asked.pop(holder, {}).values():
                self._waiting.pop(lease, None)
                lease.in_doubt = True
            return self._settle(Outcome())

    def ended(self, holder: object) -> Outcome:
        """Ends the leases of a lost holder: the engine that served it alone is cut off from the region."""
        with self._lock:
            self._discard([lease for lease in self._out if lease.holder is holder])
            return self._settle(Outcome())

    # With the lock held.

    def _discard(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._out.pop(lease, None)
            for _, _, in_the_way in self._revocations:
                in_the_way.discard(lease)
        self._lock.notify_all()

    def _settle(self, outcome: Outcome, *, cut_off: bool = False) -> Outcome:
        """Completes the revocations and decides the asks that can be by now.

        If ``cut_off`` is set, or a lease in doubt is in the way of a revocation, all leases end first, if the engine
        can do that. Their writes would fail, so the holders are told to stop.
        """
        cut_off |= any(lease.in_doubt for _, _, leases in self._revocations for lease in leases)
        if cut_off and self._cut_off is not None:
            self.base = self._cut_off()
            outcome.stops += [lease for lease in self._out if lease not in outcome.stops]
            self._discard([*self._out])
        outcome.revoked += [epoch for epoch, _, leases in self._revocations if not leases]
        self._revocations = [revocation for revocation in self._revocations if revocation[2]]
        for lease in list(self._waiting):
            allowed = self._windows.allows(lease.epoch, lease.touched)
            if allowed and any(
                other.epoch != lease.epoch and np.isin(other.touched, lease.touched).any() for other in self._out
            ):
                continue
            del self._waiting[lease]
            if allowed:
                lease.base = self.base  # with the lock: a verdict must not name an address from after a cut-off
                self._out[lease] = None
            else:
                del self._asked[lease.holder][lease.serial]
            outcome.verdicts.append((lease, allowed))
        return outcome
