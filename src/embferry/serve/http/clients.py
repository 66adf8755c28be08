"""The clients of a router, each within its limits: requests at once, requests a second, bytes of bodies a second.

A client is an API key or, where none is asked for, an IPv4 address or an IPv6 network of 64 bits.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from embferry.observe.metrics import ChatMetrics
from embferry.serve.config import RouterSettings
from embferry.serve.errors import ServeError
from embferry.serve.http.api_keys import ApiKeys, Limits
from embferry.serve.http.connections import caller_of
from embferry.trust.rates import Excess, Rates

MAX_REMEMBERED = 4096
"""Clients without a request that are remembered, for their averages."""
NO_KEY = "(none)"
"""The label of requests without a key in metrics: addresses would be too many."""


class Client:
    """One client and its counts."""

    def __init__(self, label: str, limits: Limits, now: float) -> None:
        self.label = label
        self.in_flight = 0
        self.set(limits, now)

    def set(self, limits: Limits, now: float) -> None:
        """Sets the limits."""
        self.limits = limits
        self._rates = Rates(limits.requests_per_second, limits.bytes_per_second, now)

    def enter(self, now: float) -> None:
        """Begins a request.

        Raises:
            ServeError: rate_limited.
        """
        if self.limits.requests is not None and self.in_flight >= self.limits.requests:
            raise _limited(f"{self.in_flight} requests of this client are being answered, as many as it may have", 1)
        if (excess := self._rates.enter(now)) is not None:
            raise limited(excess)
        self.in_flight += 1

    def count(self, nbytes: int) -> None:
        """Counts bytes of a body that have arrived."""
        self._rates.count(nbytes)


class Clients:
    """All clients of a router.

    Args:
        keys: those that clients need; without any, a client is its address.
        settings: the limits of clients that have none of their own.
        metrics: the router's.
        clock: monotonic seconds.
    """

    def __init__(
        self, keys: ApiKeys, settings: RouterSettings, metrics: ChatMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys, self._metrics, self._clock = keys, metrics, clock
        self._default = Limits(
            settings.client_requests, settings.client_requests_per_second, settings.client_bytes_per_second
        )
        self._known: OrderedDict[str, Client] = OrderedDict()

    @contextlib.contextmanager
    def request(self, scope: Scope) -> Iterator[Client]:
        """Counts a request of a client while the context lasts. Sets ``scope["state"]["client"]``.

        Raises:
            ServeError: invalid_api_key; rate_limited.
        """
        client = self._of(scope)
        metrics = self._metrics
        try:
            client.enter(self._clock())
        except ServeError:
            metrics.client_requests.labels(client.label, "refused").inc()
            raise
        metrics.client_requests.labels(client.label, "accepted").inc()
        in_flight = metrics.client_in_flight.labels(client.label)
        in_flight.inc()
        try:
            yield client
        finally:
            client.in_flight -= 1
            in_flight.dec()

    def counted(self, client: Client, receive: Receive) -> Receive:
        """Returns ``receive``, with the bytes counted that arrive."""
        total = self._metrics.client_bytes.labels(client.label)

        async def counting() -> Message:
            message = await receive()
            if nbytes := len(message.get("body", b"")):
                client.count(nbytes)
                total.inc(nbytes)
            return message

        return counting

    def _of(self, scope: Scope) -> Client:
        if not self._keys.required:
            return self._get(f"address {caller_of(scope)}", NO_KEY, self._default, scope)
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(given.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ServeError("invalid_api_key", "the API key is missing or wrong")
        return self._get(f"key {key.name}", key.name, key.limits.over(self._default), scope)

    def _get(self, name: str, label: str, limits: Limits, scope: Scope) -> Client:
        client = self._known.get(name)
        if client is None:
            client = self._known[name] = Client(label, limits, self._clock())
            self._forget()
        elif client.limits != limits:
            client.set(limits, self._clock())
        self._known.move_to_end(name)
        scope["state"]["client"] = name
        return client

    def _forget(self) -> None:
        """Forgets the clients whose last request was longest ago, but none that has one now."""
        if len(self._known) > MAX_REMEMBERED:
            idle = (name for name, client in self._known.items() if not client.in_flight)
            if (name := next(idle, None)) is not None:
                del self._known[name]


def limited(excess: Excess) -> ServeError:
    """Returns the error of a request that is one too many."""
    return _limited(f"this client may send {excess.limit}", excess.seconds)


def _limited(why: str, seconds: int) -> ServeError:
    return ServeError("rate_limited", f"{why}; try again in {seconds} s", retry_after=seconds)
