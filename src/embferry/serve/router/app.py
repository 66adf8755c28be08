"""The application of the router before workers of this project."""

from __future__ import annotations

import httpx

from embferry.serve.config import Settings
from embferry.serve.http.app import RouterApp, router_app
from embferry.serve.router.asked import read_completion, read_responses
from embferry.serve.router.chat import Chat
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.tokens import Detokenize, Tokenize
from embferry.serve.router.worker_source import WorkerSource


def build(
    settings: Settings, transport: httpx.AsyncBaseTransport | None = None, source: WorkerSource | None = None
) -> RouterApp:
    """Returns the application. It asks for the list of workers while its lifespan runs.

    Args:
        settings: all of them.
        transport: replaces the network in tests.
        source: lists the workers; the bootstrap server if None.
    """
    fleet = Fleet(settings, transport, source)
    endpoints = {
        "/v1/chat/completions": Chat(fleet),
        "/v1/completions": Chat(fleet, read_completion),
        "/v1/responses": Chat(fleet, read_responses),
        "/tokenize": Tokenize(fleet),
        "/detokenize": Detokenize(fleet),
    }
    return router_app(fleet, endpoints)
