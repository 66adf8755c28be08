"""One request to ``/v1/chat/completions`` as both routers handle it: everything but the answer itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embferry.observe.logs import about
from embferry.observe.metrics import ChatMetrics
from embferry.serve.byte_budget import Hold
from embferry.serve.config import Settings
from embferry.serve.errors import CODES, ServeError
from embferry.serve.http.backends import Backends
from embferry.serve.http.body import Pace, read_body
from embferry.serve.http.disconnect import before_end, run_until_disconnect
from embferry.serve.http.encoding import unpacked
from embferry.serve.http.errors import error_response
from embferry.serve.http.journal import current_record
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.reply import error_event
from embferry.serve.shared_threads import acting_for
from embferry.trust.occasions import Occasions, more

log = logging.getLogger(__name__)


B = TypeVar("B", bound=Backends[Any])


class Incoming:
    """The body of a request, until it is taken, and what the request holds of the budget.

    Attributes:
        nbytes: the length of the body, also after it was taken.
    """

    def __init__(self, body: bytes, hold: Hold) -> None:
        self._body = body
        self.nbytes = len(body)
        self.hold = hold

    def take(self) -> bytes:
        """Returns the body, and keeps no reference to it, so that its memory can be freed."""
        body, self._body = self._body, b""
        return body


class ClientResponse:
    """The response to one client. Its status is open until the first byte of the body is there.

    Attributes:
        room: the request's room, for log lines about a failure; None if it has none.
        on_start: called when the status is about to be sent.
        facts: what the log line at the end of the request says beside status and duration.
        headers: those that the response has beside its own.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = time.monotonic()
        self.started = False
        self.room: int | None = None
        self.on_start: Callable[[], None] = lambda: None
        self.facts: dict[str, Any] = {}
        self.headers: list[tuple[bytes, bytes]] = []

    def note_ignored(self, ignored: Ignored) -> None:
        """Names the request's fields that have no effect in the response's head and in the log."""
        if ignored:
            self.headers += ignored.headers
            self.facts["ignored"] = str(ignored)

    def first_token(self, metrics: ChatMetrics) -> None:
        """Counts the time to the first token, which goes to the client now."""
        metrics.first_token_seconds.observe(self.seconds)
        current_record().first_token(self.seconds)

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._began

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Sends status and headers; :meth:`write` follows."""
        self.started = True
        self.on_start()
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

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
        self._refusals = Occasions()

    async def drain(self) -> None:
        """Called when all requests have ended."""

    @abstractmethod
    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        """Handles one request. Cancelled when the client leaves or ``router.request_timeout`` is over.

        Raises:
            ServeError: the request fails; the client is told, as a response or as the last event of the stream.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics, client = self.fleet.metrics, scope.setdefault("state", {}).get("client", "")
        with (
            self.fleet.journal.request(scope["path"], scope["headers"]) as record,
            contextlib.ExitStack() as held,
            acting_for(client),
        ):
            held.enter_context(metrics.in_flight.track_inprogress())
            held.enter_context(metrics.seconds.time())
            hold = held.enter_context(self.fleet.budget.hold(client=client))
            is_complete = False

            def complete() -> None:
                nonlocal is_complete
                is_complete = True
                record.end(response.facts.get("outcome") or "answered")
                held.close()

            response = ClientResponse(before_end(send, complete))
            scope["state"]["facts"] = response.facts
            response.facts["number"] = record.number
            if record.trace is not None:
                response.facts["trace"] = record.trace.id

            def client_left() -> None:
                response.facts["outcome"] = "client left"
                self.fleet.metrics.aborted.inc()
                self.fleet.journal.event("client_left")

            incoming: Incoming | None = None

            async def read() -> None:
                nonlocal incoming
                router = self._settings.router
                body = await read_body(scope, receive, router.max_body_bytes, hold, pace=Pace.of(router))
                if body is not None:
                    body = await unpacked(scope, receive, body, router.max_body_bytes, hold)
                incoming = None if body is None else Incoming(body, hold)

            await self.respond(read(), response)
            if incoming is not None:
                work = self.respond(self.answer(incoming, scope, response), response)
                await run_until_disconnect(work, receive, client_left, lambda: is_complete)

    async def respond(self, work: Coroutine[Any, Any, None], response: ClientResponse) -> None:
        """Awaits a part of the work within the time that is left, and reports its failure."""
        seconds = self._settings.router.request_timeout
        try:
            async with asyncio.timeout(max(0.0, seconds - response.seconds)):
                await work
        except TimeoutError:
            why = f"the request took longer than {seconds:g} seconds (router.request_timeout) and was given up"
            await self._fail(ServeError("request_timeout", why), response)
        except ServeError as error:
            await self._fail(error, response)

    async def _fail(self, error: ServeError, response: ClientResponse) -> None:
        self.fleet.metrics.errors.labels(error.code).inc()
        current_record().fails(error.code)
        response.facts |= {"outcome": error.code, "error": error.detail}
        level, count = logging.DEBUG if error.http_status < 500 else logging.WARNING, 0
        if error.http_status == 503:  # as many as clients ask while there is no room
            due = self._refusals.count(error.code if error.code in CODES else "of a worker")
            level, count = (logging.DEBUG, 0) if due is None else (logging.WARNING, due)
        with about(room=response.room):
            facts = {"code": error.code, "status": error.http_status}
            log.log(level, "refused: %s%s", error.detail, more(count), extra=facts)
        if response.started:
            await response.write(error_event(error), more=False)
        else:
            await response.send_whole(error_response(error))
