"""A router's pages about itself: ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/v1/models``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embferry import __version__
from embferry.observe.metrics import CONTENT_TYPE
from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.http.backends import Backends
from embferry.serve.http.errors import retry_after


def status_routes(backends: Backends[Any]) -> list[Route]:
    """Returns the routes of the pages."""

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(backends.models().values())})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if (model := backends.models().get(name)) is None:
            raise ServeError("model_not_found", f"the model {shown(name, 80)} is not served here", param="model")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        """Shows that the process is alive and its event loop runs."""
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        missing = backends.missing()
        body = {"ready": not missing, "missing": missing, "workers": backends.counts()}
        status = 503 if missing else 200
        return JSONResponse(body, status, retry_after(status))

    async def metrics(request: Request) -> Response:
        return Response(backends.metrics.exposition(), media_type=CONTENT_TYPE)

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/version", version),
    ]
