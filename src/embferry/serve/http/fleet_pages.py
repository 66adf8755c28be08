"""A router's pages about its workers: ``/workers``, ``/sd`` for Prometheus, and ``/debug/pool``.

They name addresses within the cluster, so they need an API key where the router asks for one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embferry.serve.config import Settings
from embferry.serve.http.address import bracketed
from embferry.serve.http.backends import Backends, Scraped

WORKERS, DISCOVERY, POOL = "/workers", "/sd", "/debug/pool"
PAGES = (WORKERS, DISCOVERY, POOL)


def fleet_routes(backends: Backends[Any]) -> list[Route]:
    """Returns the routes of the pages."""

    async def workers(request: Request) -> Response:
        return JSONResponse({"workers": [asdict(worker) for worker in backends.known()]})

    async def discovery(request: Request) -> Response:
        """Lists this router and its workers in the format of Prometheus' ``http_sd_configs``."""
        own = own_url(backends.settings, request)
        return JSONResponse([_target(one) for one in (Scraped(own, "router", own), *backends.scraped())])

    async def pool(request: Request) -> Response:
        return JSONResponse({"pools": await backends.pools()})

    return [Route(WORKERS, workers), Route(DISCOVERY, discovery), Route(POOL, pool)]


def own_url(settings: Settings, request: Request) -> str:
    """Returns this router's URL: by its host in the settings or, if that stands for all, by the address asked."""
    host, port = request.scope.get("server") or (settings.reachable_host, settings.router.port)
    try:
        is_every = ipaddress.ip_address(settings.reachable_host.strip("[]")).is_unspecified
    except ValueError:  # a name
        is_every = False
    return f"{request.url.scheme}://{bracketed(host if is_every else settings.reachable_host.strip('[]'))}:{port}"


def _target(scraped: Scraped) -> dict[str, Any]:
    """Returns a group of one target. Its labels with two underscores tell Prometheus where the metrics are."""
    parts = urlsplit(scraped.url)
    port = f":{parts.port}" if parts.port is not None else ":443" if parts.scheme == "https" else ":80"
    labels = {
        "__scheme__": parts.scheme,
        "__metrics_path__": f"{parts.path.rstrip('/')}/metrics",
        "part": scraped.part,
        "worker": scraped.worker,
    }
    return {"targets": [bracketed(parts.hostname or "") + port], "labels": labels}
