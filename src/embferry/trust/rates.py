"""Limits on averages: requests and bytes a second of one client, and of each address that proves nothing."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

BURST_SECONDS = 2.0
"""An average is taken over this time: a client that was idle may do at once what it may do in these seconds."""
MAX_NETWORKS = 4096
"""Networks that are remembered, for their averages."""


class Excess(NamedTuple):
    """Why a request is refused.

    Attributes:
        limit: What the client exceeds, such as "200 requests a second".
        seconds: Whole seconds after which it may ask again.
    """

    limit: str
    seconds: int


class Bucket:
    """A limit on an average (a token bucket). It may be overdrawn: then nothing is allowed until that is paid back.

    Args:
        rate: Units a second.
        now: Monotonic seconds.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self._at = rate, now
        self._most = max(1.0, rate * BURST_SECONDS)
        self._level = self._most

    def wait(self, needed: float, now: float) -> float:
        """Returns the seconds until ``needed`` units are there."""
        self._level = min(self._most, self._level + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, (needed - self._level) / self.rate)

    def take(self, units: float) -> None:
        """Takes units, also if they are not there."""
        self._level -= units


class Rates:
    """The averages of one client.

    Args:
        requests: A second; None without a limit.
        nbytes: Bytes of bodies a second; None without a limit.
        now: Monotonic seconds.
    """

    def __init__(self, requests: float | None, nbytes: float | None, now: float) -> None:
        self._requests, self._bytes = (None if rate is None else Bucket(rate, now) for rate in (requests, nbytes))

    def enter(self, now: float) -> Excess | None:
        """Counts a request, or returns why there may be none now."""
        for bucket, unit in ((self._requests, "requests"), (self._bytes, "bytes")):
            if bucket is not None and (wait := bucket.wait(1.0, now)) > 0:
                return Excess(f"{bucket.rate:g} {unit} a second", max(1, math.ceil(wait)))
        if self._requests is not None:
            self._requests.take(1.0)
        return None

    def count(self, nbytes: int) -> None:
        """Counts bytes of a body that have arrived."""
        if self._bytes is not None:
            self._bytes.take(nbytes)


class NetworkRates:
    """The averages of every network that sends requests without a proof. For one thread.

    Args:
        requests: A second, of one network.
        nbytes: Bytes of bodies a second, of one network.
        is_exempt: Returns whether an address has no limits.
        clock: Monotonic seconds.

    Attributes:
        refused: Requests that were too many.
    """

    def __init__(
        self,
        requests: float,
        nbytes: float,
        is_exempt: Callable[[str], bool] = lambda address: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._is_exempt, self._clock = (requests, nbytes), is_exempt, clock
        self._known: OrderedDict[str, Rates] = OrderedDict()
        self.refused = 0

    def __len__(self) -> int:
        """Networks that are remembered."""
        return len(self._known)

    def enter(self, address: str, network: str) -> Excess | None:
        """Counts a request of an address, or returns why there may be none now.

        Args:
            address: The client's IP address.
            network: The network with which it is counted (:func:`~embferry.transports.net.address.network_of`).
        """
        if self._is_exempt(address):
            return None
        rates = self._known.get(network)
        if rates is None:
            rates = self._known[network] = Rates(*self._limits, self._clock())
            if len(self._known) > MAX_NETWORKS:
                self._known.popitem(last=False)
        self._known.move_to_end(network)
        excess = rates.enter(self._clock())
        self.refused += excess is not None
        return excess

    def count(self, network: str, nbytes: int) -> None:
        """Counts bytes of a body that have arrived."""
        if (rates := self._known.get(network)) is not None:
            rates.count(nbytes)
