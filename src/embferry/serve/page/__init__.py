"""The live page of a router: one HTML file, one style sheet and one script, served as they are.

They hold no data. The script asks for them at ``/activity/stream``, with the API key if the router has one.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = "/page/"
"""Begins the paths of the parts of the page."""
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",  # a browser keeps it, and asks with its digest whether it is still the same
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> list[Route]:
    """Returns the routes of the page: ``/``, and its parts."""
    return [_route("/" if name == "index.html" else FOLDER + name, name) for name in _TYPES]


def _route(path: str, name: str) -> Route:
    content = resources.files(__name__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag, "content-type": _TYPES[name]}

    async def part(request: Request) -> Response:
        if tag in Headers(scope=request.scope).get("if-none-match", ""):
            return Response(status_code=304, headers={**_HEADERS, "etag": tag})
        return Response(content, headers=headers)

    return Route(path, part)
