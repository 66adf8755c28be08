"""Limits on requests that are answered without a proof of the cluster key: their number and bytes for each address.

A request that is refused for want of a proof needs no such limit. It costs nothing but the refusal, of which a
connection gets one a second (:mod:`.connections`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.observe.metrics import Metrics
from embferry.serve.config import SecuritySettings
from embferry.serve.errors import ServeError
from embferry.serve.http.clients import limited
from embferry.serve.http.connections import caller_of
from embferry.serve.http.proofs import STREAM_SECRET
from embferry.trust.policy import is_loopback
from embferry.trust.rates import NetworkRates
from embferry.trust.refusals import Refusals
from embferry.trust.trust import Trust

Respond = Callable[[ServeError], Callable[[Scope, Receive, Send], Awaitable[None]]]


def rates_of(settings: SecuritySettings) -> NetworkRates:
    """Returns the limits of one server. Without a cluster key, its own machine has none: the cluster is there."""
    is_exempt = is_loopback if Trust.of_environment().keys is None else lambda address: False
    own = settings.unproved_requests_per_second, settings.unproved_bytes_per_second
    return NetworkRates(*own, is_exempt)


class Unproved:
    """ASGI middleware that limits requests without a proof. Those with one pass.

    Args:
        app: The application behind.
        rates: The limits.
        name: The server, for the log: "the encode worker".
        respond: Makes the response to a request that is one too many.
        metrics: The server's.
    """

    def __init__(self, app: ASGIApp, rates: NetworkRates, name: str, respond: Respond, metrics: Metrics) -> None:
        self._app, self._rates, self._respond = app, rates, respond
        about = "Requests without a proof of the cluster key that were too many of their address"
        self._refused = metrics.counter("embferry_process_unproved_requests_refused", about)
        self._refusals = Refusals(name, "a request")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or STREAM_SECRET in scope:
            await self._app(scope, receive, send)
            return
        network = caller_of(scope)
        address = scope["client"][0] if scope.get("client") else ""
        if (excess := self._rates.enter(address, network)) is not None:
            self._refused.inc()
            self._refusals.report(address, f"it sends more than {excess.limit} without a proof of the cluster key")
            await self._respond(limited(excess))(scope, receive, send)
            return

        async def counting() -> Message:
            message = await receive()
            self._rates.count(network, len(message.get("body", b"")))
            return message

        await self._app(scope, counting, send)
