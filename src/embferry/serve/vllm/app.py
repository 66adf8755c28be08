"""The application of the router before vLLM."""

from __future__ import annotations

import httpx
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.serve.config import Settings
from embferry.serve.http.app import backend_client, router_app
from embferry.serve.http.status import status_routes
from embferry.serve.media.fetch import Fetcher
from embferry.serve.vllm.chat import Chat
from embferry.serve.vllm.connectors import CONNECTORS
from embferry.serve.vllm.failover import Failover
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.item_encoder import ItemEncoder
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.vllm.received_cache import ReceivedCache

KEEPALIVE_SECONDS = 2.0
"""Less than the 5 s after which vLLM closes an idle connection, so that no request goes to one that is being closed."""


def build(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> ASGIApp:
    """Returns the application. It probes the instances while its lifespan runs.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
    """
    metrics = VllmRouterMetrics()
    certificates = httpx.create_ssl_context(trust_env=False)
    client = backend_client(settings.router, certificates, keepalive_seconds=KEEPALIVE_SECONDS, transport=transport)
    fleet = Fleet(settings, client, metrics)
    fetcher = Fetcher(settings.media, certificates)
    connector = CONNECTORS[settings.vllm.connector]()
    encoder = ItemEncoder(settings, fleet, client, metrics, connector)
    failover = Failover(encoder, settings.vllm.failovers_per_item, metrics)
    received = ReceivedCache(encoder, settings.vllm.received_bytes if settings.vllm.connector == "embferry" else 0)
    chat = Chat(settings, fleet, client, fetcher, metrics, connector, encoder, failover, received)

    async def close() -> None:
        await fetcher.close()
        await client.aclose()

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        *status_routes(fleet, fleet.models, metrics.exposition),
        Route("/ec/failovers/{token}", failover.replace, methods=["POST"]),
        Route("/ec/failures/{token}", failover.fail, methods=["POST"]),
    ]
    return router_app(routes, settings.router, metrics.requests, fleet.watch, close, retry_after=True)
