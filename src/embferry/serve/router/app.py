"""The application of the router before workers of this project."""

from __future__ import annotations

import time

import httpx
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.observe.metrics import RouterMetrics
from embferry.serve.config import Settings
from embferry.serve.http.app import backend_client, router_app
from embferry.serve.http.status import status_routes
from embferry.serve.media.fetch import Fetcher
from embferry.serve.openai.reply import model_object
from embferry.serve.router.chat import Chat
from embferry.serve.router.fleet import Fleet


def build(settings: Settings) -> ASGIApp:
    """Returns the application. It asks for the list of workers while its lifespan runs."""
    metrics = RouterMetrics()
    certificates = httpx.create_ssl_context(trust_env=False)
    client = backend_client(settings.router, certificates)
    fleet = Fleet(settings, client, metrics)
    fetcher = Fetcher(settings.media, certificates)
    chat = Chat(settings, fleet, client, fetcher, metrics)
    name = settings.public_model_name
    models = {name: model_object(name, int(time.time()))}

    async def close() -> None:
        await chat.drain()
        await fetcher.close()
        await client.aclose()

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        *status_routes(fleet, lambda: models, metrics.exposition),
    ]
    return router_app(routes, settings.router, metrics.requests, fleet.watch, close)
