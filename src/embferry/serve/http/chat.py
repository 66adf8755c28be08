"""One request to ``/v1/chat/completions`` as both routers handle it: everything but the answer itself."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embferry.observe.logs import about
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.backends import Backends
from embferry.serve.http.body import read_body
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.errors import error_response
from embferry.serve.openai.reply import error_event

log = logging.getLogger(__name__)


B = TypeVar("B", bound=Backends[Any])


class ClientResponse:
    """The response to one client. Its status is open until the first byte of the body is there.

    Attributes:
        room: the request's room, for log lines about a failure; None if it has none.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = time.monotonic()
        self.started = False
        self.room: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._began

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Sends status and headers; :meth:`write` follows."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Sends a part of the body, the last one if ``more`` is false."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def send_whole(self, response: Response) -> None:
        """Sends a complete response."""
        await self.start(response.status_code, response.raw_headers)
        await self.write(bytes(response.body), more=False)


class ChatEndpoint(ABC, Generic[B]):
    """An ASGI application of its own: it has to notice that the client leaves while it waits for a backend.

    Args:
        fleet: the workers or instances.
    """

    def __init__(self, fleet: B) -> None:
        self.fleet = fleet
        self._settings: Settings = fleet.settings

    async def drain(self) -> None:
        """Called when all requests have ended."""

    @abstractmethod
    async def answer(self, body: bytes, scope: Scope, response: ClientResponse) -> None:
        """Handles one request. Cancelled when the client leaves or ``router.request_timeout`` is over.

        Raises:
            ServeError: the request fails; the client is told, as a response or as the last event of the stream.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.fleet.metrics.in_flight.track_inprogress(), self.fleet.metrics.seconds.time():
            response = ClientResponse(send)
            try:
                body = await read_body(receive, self._settings.router.max_body_bytes)
            except ServeError as error:
                await self._fail(error, response)
                return
            if body is not None:
                await run_until_disconnect(self.respond(body, scope, response), receive, self._client_left)

    async def respond(self, body: bytes, scope: Scope, response: ClientResponse) -> None:
        """Runs :meth:`answer` within the time limit and reports its failure."""
        seconds = self._settings.router.request_timeout
        try:
            async with asyncio.timeout(seconds):
                await self.answer(body, scope, response)
        except TimeoutError:
            why = f"the request took longer than {seconds:g} seconds (router.request_timeout) and was given up"
            await self._fail(ServeError("request_timeout", why), response)
        except ServeError as error:
            await self._fail(error, response)

    def _client_left(self) -> None:
        log.info("the client left")
        self.fleet.metrics.aborted.inc()

    async def _fail(self, error: ServeError, response: ClientResponse) -> None:
        self.fleet.metrics.errors.labels(error.code).inc()
        level = logging.INFO if error.http_status < 500 else logging.WARNING
        with about(room=response.room):
            log.log(level, "refused: %s", error.detail, extra={"code": error.code, "status": error.http_status})
        if response.started:
            await response.write(error_event(error), more=False)
        else:
            await response.send_whole(error_response(error, retry_after=self.fleet.retry_after))
