"""The application of the router before vLLM."""

from __future__ import annotations

import httpx
from starlette.routing import Route

from embferry.serve.config import Settings
from embferry.serve.http.app import RouterApp, router_app
from embferry.serve.vllm.chat import Chat
from embferry.serve.vllm.fleet import Fleet


def build(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> RouterApp:
    """Returns the application. It probes the instances while its lifespan runs.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
    """
    chat = Chat(Fleet(settings, transport))
    reports = [
        Route("/ec/failovers/{token}", chat.failover.replace, methods=["POST"]),
        Route("/ec/failures/{token}", chat.failover.fail, methods=["POST"]),
    ]
    return router_app(chat, reports)
