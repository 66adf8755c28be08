"""Every bit of a small request to a worker, and of its answers, flipped: the right thing happens, or an error.

The messages are the bytes on the wire, which h11 parses as uvicorn's server and httpx's client do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import h11
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from embferry.serve.errors import ServeError
from embferry.serve.http.body import read_body
from embferry.serve.http.calls import checked_body, checked_lines, is_streamed
from embferry.serve.http.digests import Digests
from embferry.serve.http.errors import exception_handlers
from embferry.serve.worker.errors import error_response
from embferry.trust.digests import LINES, MESSAGE_DIGEST, DamagedError, LineWriter
from tests.serve.digested import digested
from tests.trust.test_digests import flips

T = TypeVar("T")
BODY = b'{"room": 7, "items": ["red", "blue"]}'
ANSWER = {"endpoint": "tcp://127.0.0.1:4000", "items": [[1, 8, 8]]}
EVENTS = [b'{"type":"token","text":"red"}', b"", b'{"type":"end"}']


class Worker:
    """A worker's application. ``done``: what requests have made it do."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        routes = [
            Route("/encode", self._encode, methods=["POST"]),
            Route("/rooms/{room:int}", self._abort, methods=["DELETE"]),
        ]
        app = Starlette(routes=routes, exception_handlers=exception_handlers(error_response))
        self.app: ASGIApp = Digests(app, error_response, lambda path: True)

    async def _encode(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, 1000, between_parts=True)
        if body is not None:
            self.done.append(body)
        return JSONResponse(ANSWER)

    async def _abort(self, request: Request) -> Response:
        self.done.append(request.path_params["room"])
        return Response(status_code=204)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def wire(request: httpx.Request) -> bytes:
    """Returns the bytes of a request."""
    connection = h11.Connection(h11.CLIENT)
    head = connection.send(h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw))
    return (head or b"") + request.content


async def serve(app: ASGIApp, received: bytes) -> list[Message]:
    """Feeds the bytes of a connection to an application, as uvicorn does. Returns what it sends for the first request.

    Returns nothing if there is no request in them; a body that does not end is one that the client leaves.
    """
    connection, sent = h11.Connection(h11.SERVER), list[Message]()
    connection.receive_data(received)
    connection.receive_data(b"")
    try:
        head = connection.next_event()
    except h11.RemoteProtocolError:
        return sent
    if not isinstance(head, h11.Request):
        return sent

    async def receive() -> Message:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return {"type": "http.disconnect"}
        if isinstance(event, h11.Data):
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        if isinstance(event, h11.EndOfMessage):
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    path, _, query = head.target.partition(b"?")
    scope = {"type": "http", "method": head.method.decode("ascii"), "path": path.decode("latin-1"), "raw_path": path}
    scope |= {"query_string": query, "headers": list(head.headers), "asgi": {"spec_version": "2.3"}}
    await app(scope, receive, send)
    return sent


def status_of(sent: list[Message]) -> int | None:
    return sent[0]["status"] if sent else None


REQUESTS: dict[str, tuple[httpx.Request, Any]] = {
    "a body": (digested(httpx.Request("POST", "http://worker/encode", content=BODY)), BODY),
    "an abort": (digested(httpx.Request("DELETE", "http://worker/rooms/7")), 7),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_flipped_request_does_what_it_should_or_nothing(kind: str) -> None:
    request, right = REQUESTS[kind]
    worker = Worker()
    assert status_of(run(serve(worker.app, wire(request)))) in (200, 204)

    async def all_of_them() -> None:
        for changed in flips(wire(request)):
            worker.done.clear()
            status = status_of(await serve(worker.app, changed))
            assert worker.done in ([], [right]), changed
            assert bool(worker.done) == (status in (200, 204)), changed

    run(all_of_them())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(wire(REQUESTS["a body"][0])) - 1), st.integers(1, 255)), min_size=1))
def test_many_flips_of_a_request_do_what_it_should_or_nothing(changes: list[tuple[int, int]]) -> None:
    request, right = REQUESTS["a body"]
    worker, changed = Worker(), bytearray(wire(request))
    for at, bits in changes:
        changed[at] ^= bits
    run(serve(worker.app, bytes(changed)))
    assert worker.done in ([], [right])


@pytest.mark.parametrize("header", ["Content-Digest", MESSAGE_DIGEST])
def test_a_request_without_digest_is_refused(header: str) -> None:
    request = digested(httpx.Request("POST", "http://worker/encode", content=BODY))
    del request.headers[header]
    worker = Worker()
    sent = run(serve(worker.app, wire(request)))
    assert (status_of(sent), worker.done) == (400, [])
    error = json.loads(sent[1]["body"])["error"]
    assert (error["code"], error["retryable"]) == ("body_damaged", True)
    assert (b"connection", b"close") in sent[0]["headers"]  # a wrong length would make the next request a wrong one


# Answers


def answered(messages: Iterable[Message]) -> bytes:
    """Returns the bytes of an answer."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nhost: w\r\ncontent-length: 0\r\n\r\n")
    while connection.next_event() is not h11.NEED_DATA and connection.their_state is not h11.DONE:
        pass
    sent = b""
    for message in messages:
        if message["type"] == "http.response.start":
            sent += connection.send(h11.Response(status_code=message["status"], headers=message["headers"])) or b""
            continue
        sent += connection.send(h11.Data(data=message.get("body", b""))) or b""
        if not message.get("more_body"):
            sent += connection.send(h11.EndOfMessage()) or b""
    return sent


class Received(httpx.AsyncByteStream):
    """The body of an answer as httpx reads it from a connection that ends after these bytes."""

    def __init__(self, connection: h11.Connection) -> None:
        self._connection = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while not isinstance(event := self._connection.next_event(), h11.EndOfMessage):
                if not isinstance(event, h11.Data):
                    raise httpx.RemoteProtocolError("it broke off")
                yield bytes(event.data)
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error


async def understood(request: httpx.Request, received: bytes) -> Any:
    """Returns what a router understands of an answer: status and body, or the lines up to the end event.

    Raises:
        DamagedError, httpx.TransportError: it is not understood.
    """
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=request.method, target="/", headers=[("host", "w"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(received)
    connection.receive_data(b"")
    try:
        while isinstance(head := connection.next_event(), h11.InformationalResponse):
            pass
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    if not isinstance(head, h11.Response):
        raise httpx.RemoteProtocolError("it broke off")
    response = httpx.Response(
        head.status_code, headers=head.headers.raw_items(), stream=Received(connection), request=request
    )
    if not is_streamed(response):
        return response.status_code, await checked_body(response)
    lines = []
    async for line in checked_lines(response):
        lines.append(line)
        if line == EVENTS[-1]:
            return lines
    raise httpx.RemoteProtocolError("it broke off")


REQUEST = REQUESTS["a body"][0]


async def _stream(scope: Any, receive: Any, send: Any) -> None:
    writer = LineWriter(REQUEST.headers[MESSAGE_DIGEST])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", LINES.encode())]})
    for event in EVENTS:
        body, more = writer.line(event), event is not EVENTS[-1]
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    await error_response(ServeError("model_not_found", "there is none"))(scope, receive, send)


ANSWERS: dict[str, ASGIApp] = {
    "a whole answer": Worker().app,
    "a refusal": Digests(_refuse, error_response, lambda path: True),
    "a stream": Digests(_stream, error_response, lambda path: True),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_flipped_answer_is_understood_rightly_or_is_an_error(kind: str) -> None:
    sent = answered(run(serve(ANSWERS[kind], wire(REQUEST))))

    async def all_of_them() -> None:
        right = await understood(REQUEST, sent)
        damaged = 0
        for changed in flips(sent):
            try:
                assert await understood(REQUEST, changed) == right, changed
            except (DamagedError, httpx.TransportError):
                damaged += 1
        assert damaged > 8 * 64

    run(all_of_them())


def test_an_answer_to_another_request_is_an_error() -> None:
    other = digested(httpx.Request("POST", "http://worker/encode", content=BODY + b" "))
    for app in ANSWERS.values():
        sent = answered(run(serve(app, wire(REQUEST))))
        with pytest.raises(DamagedError):
            run(understood(other, sent))
