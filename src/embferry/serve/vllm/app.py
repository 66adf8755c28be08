"""The application of the router before vLLM."""

from __future__ import annotations

import httpx
from starlette.routing import Route

from embferry.serve.config import Settings
from embferry.serve.http.app import RouterApp, router_app
from embferry.serve.http.chat import ChatEndpoint
from embferry.serve.vllm.chat import Chat
from embferry.serve.vllm.client_request import CHAT
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.instance_source import InstanceSource
from embferry.serve.vllm.passed_on import PATHS, PassedOn
from embferry.serve.vllm.responses import RESPONSES, Responses


def build(
    settings: Settings, transport: httpx.AsyncBaseTransport | None = None, source: InstanceSource | None = None
) -> RouterApp:
    """Returns the application. It probes the instances while its lifespan runs.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
        source: tells which instances there are; the settings alone if None.
    """
    fleet = Fleet(settings, transport, source)
    chat = Chat(fleet)
    endpoints: dict[str, ChatEndpoint[Fleet]] = {CHAT: chat}
    endpoints |= {path: PassedOn(fleet, path) for path in PATHS} | {RESPONSES: Responses(chat.encoder)}
    reports = [
        Route("/ec/failovers/{token}", chat.failover.replace, methods=["POST"]),
        Route("/ec/failures/{token}", chat.failover.fail, methods=["POST"]),
    ]
    return router_app(fleet, endpoints, reports)
