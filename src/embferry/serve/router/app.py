"""The application of the router before workers of this project."""

from __future__ import annotations

from embferry.serve.config import Settings
from embferry.serve.http.app import RouterApp, router_app
from embferry.serve.router.chat import Chat
from embferry.serve.router.fleet import Fleet


def build(settings: Settings) -> RouterApp:
    """Returns the application. It asks for the list of workers while its lifespan runs."""
    return router_app(Chat(Fleet(settings)))
