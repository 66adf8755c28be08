"""A router and fake workers in this process, without sockets: the router calls the application of the fakes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx

from embferry.serve.router.app import build
from tests.serve.fakes import Deployment


class Inside(Deployment):
    """The same fakes as of a running deployment. ``asking`` gives clients of the router."""

    @contextlib.asynccontextmanager
    async def asking(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        """Yields a client of the router. ``options``: of :class:`httpx.AsyncClient`."""
        app = build(self.settings, httpx.ASGITransport(self._app()))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://router", **options) as client:
            yield client

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Returns the router's response to a body in JSON."""
        async with self.asking() as client:
            return await client.post(path, json=body, **options)

    def close(self) -> None:
        """Closes the sockets that a running deployment would have."""
        for one in (self._fake_socket, self._router_socket):
            one.close()


async def activity(client: httpx.AsyncClient) -> dict[str, Any]:
    """Returns the journal of a router."""
    return dict((await client.get("/activity")).json())
