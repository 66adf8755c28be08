"""Ray's proxies, which clients reach: where they listen."""

from __future__ import annotations

from ray.serve.context import _get_global_client

from embferry.serve.config import Settings
from embferry.serve.security import check_router


def address() -> tuple[str, int]:
    """Returns host and port at which Ray's proxies listen on each node.

    Raises:
        RayServeException: Serve does not run.
    """
    options = _get_global_client().http_config  # there is no public way to ask
    return str(options.host), int(options.port)


def check_proxies(settings: Settings) -> None:
    """Checks that the router may be behind these proxies.

    Raises:
        ConfigError: strangers can reach them, and the router asks for no API key; or its API keys cannot be used.
    """
    host, _ = address()
    check_router(settings.model_copy(update={"host": host}))
