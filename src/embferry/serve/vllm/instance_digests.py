"""Digests on the hop between the router and an instance: ``vllm serve --middleware`` with :class:`InstanceDigests`.

A request of the router has digests (:mod:`embferry.trust.digests`), and so has the answer to it. A streamed answer
becomes checked lines, each with a piece of the body. With a cluster key, requests and answers have proofs too, and
requests of others are refused (:mod:`.instance_proofs`); without one, they are served as without the middleware.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable

import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.protocol.text import printable
from embferry.serve.errors import ServeError
from embferry.serve.http.calls import checked_lines, is_streamed
from embferry.serve.http.digests import Digests
from embferry.serve.http.errors import error_response
from embferry.serve.http.proofs import line_writer
from embferry.serve.vllm import instance_sounds, instance_videos
from embferry.serve.vllm.instance_proofs import InstanceProofs, is_proved
from embferry.trust.bounded_answers import MAX_COMPLETION_BYTES
from embferry.trust.digests import (
    CONTENT_DIGEST,
    LINES,
    MESSAGE_DIGEST,
    ContentHash,
    DamagedError,
    LineWriter,
    check_answer,
)
from embferry.trust.trust import Trust

CONTENT_TYPE = "Embferry-Content-Type"
"""The header with the media type of a streamed answer before it became lines."""
_SHOWN = 300
"""Characters of an exception that an answer repeats."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""Where an object is in memory, which no client may know. vLLM's own answers leave it out too."""


class InstanceDigests:
    """ASGI middleware of an instance. The environment says whether there is a cluster key.

    It also protects the instance from damaged videos (:mod:`.instance_videos`) and odd sounds
    (:mod:`.instance_sounds`): it is the part of this project that every process of an instance has in which files are
    decoded.
    """

    def __init__(self, app: ASGIApp) -> None:
        instance_videos.protect()
        instance_sounds.protect()
        self._served = _answered(app)
        keys = Trust.of_environment().keys
        self._app: ASGIApp = Digests(self._checked, error_response, lambda path: keys is not None)
        if keys is not None:
            self._app = InstanceProofs(self._app, keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        digest = Headers(scope=scope).get(MESSAGE_DIGEST) if scope["type"] == "http" else None
        if digest is None or scope["method"] != "POST":
            await self._served(scope, receive, send)
            return
        body = _CheckedBody(receive, Headers(scope=scope).get(CONTENT_DIGEST))
        headers = MutableHeaders(raw=[*scope["headers"]])
        headers["content-type"] = "application/json"  # no digest covers the router's
        scope = {**scope, "headers": headers.raw}
        try:
            await self._served(scope, body, _InLines(send, line_writer(scope), body))
        except Exception:
            if not body.is_damaged:
                raise
        if body.is_damaged:
            await error_response(ServeError("body_damaged", "the body does not match its digest"))(scope, receive, send)


def _answered(app: ASGIApp) -> ASGIApp:
    """Returns the application with an answer to requests in which it raises, as the server would give it.

    The server's own answer comes from outside of all middleware, so it has no digest and no proof. What was raised is
    raised again: the server logs it.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = scope["type"] != "http"

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await app(scope, receive, noting)
        except Exception as error:
            if not has_begun:
                why = printable(_ADDRESS.sub("", str(error)), _SHOWN) or type(error).__name__
                content = {"error": {"message": why, "type": "InternalServerError", "param": None, "code": 500}}
                await JSONResponse(content, 500)(scope, receive, send)
            raise

    return call


class _CheckedBody:
    """A ``receive`` that checks the body. In place of the end of a damaged one, the client seems to have left."""

    def __init__(self, receive: Receive, digest: str | None) -> None:
        self._receive, self._digest = receive, digest
        self._hash = ContentHash()
        self._is_over = self.is_damaged = False

    async def __call__(self) -> Message:
        if self.is_damaged:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if self._is_over or message["type"] != "http.request":
            return message
        self._hash.update(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
        self.is_damaged = self._is_over and self._hash.content_digest != self._digest
        return {"type": "http.disconnect"} if self.is_damaged else message


class _InLines:
    """A ``send`` that makes checked lines of an answer of unknown length, and drops those to damaged requests."""

    def __init__(self, send: Send, lines: LineWriter, body: _CheckedBody) -> None:
        self._send, self._lines, self._body = send, lines, body
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        if self._body.is_damaged:
            return
        if message["type"] == "http.response.start" and message["status"] == 200:
            headers = MutableHeaders(raw=[*message["headers"]])
            self._is_stream = "content-length" not in headers
            if self._is_stream:
                headers[CONTENT_TYPE], headers["content-type"] = headers.get("content-type", ""), LINES
                message = {**message, "headers": headers.raw}
        elif self._is_stream and message.get("body"):
            piece = json.dumps(message["body"].decode("latin-1")).encode()
            message = {**message, "body": self._lines.line(piece)}
        await self._send(message)


async def received_pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yields the body of a streamed answer, checked if the instance has the middleware. A proved answer has to be.

    Raises:
        DamagedError: it is not as it was sent.
        httpx.TransportError: it broke off.
    """
    if not is_streamed(response):
        if is_proved(response):
            raise DamagedError("the streamed answer has no checks")
        async for piece in response.aiter_raw():
            yield piece
        return
    async for line in checked_lines(response):
        yield json.loads(line).encode("latin-1")


def content_type_of(response: httpx.Response) -> str:
    """Returns the media type of an answer."""
    name = CONTENT_TYPE if is_streamed(response) else "content-type"
    return str(response.headers.get(name, ""))


async def whole_body(response: httpx.Response, grow: Callable[[int], object] = lambda nbytes: None) -> bytes:
    """Reads an answer as :func:`_whole_body` does, and closes the connection of one with a status from 500 on.

    After an exception in vLLM its server closes the connection without saying so in the answer. The next request could
    be sent on it before that is known here.
    """
    body = await _whole_body(response, grow)
    if response.status_code >= 500 and (stream := response.extensions.get("network_stream")) is not None:
        await stream.aclose()
    return body


async def _whole_body(response: httpx.Response, grow: Callable[[int], object]) -> bytes:
    """Reads an answer and returns its body, checked if the instance has the middleware. A proved answer has to be.

    Args:
        response: its body has not been read.
        grow: called with the bytes of the body, before they are read if their number is known. Ends it by raising.

    Raises:
        DamagedError: it is not as it was sent, or its request did not arrive as it was sent.
        httpx.TransportError: it broke off.
    """
    if is_streamed(response):
        whole = bytearray()
        async for piece in received_pieces(response):
            grow(len(piece))
            whole += piece
            if len(whole) > MAX_COMPLETION_BYTES:
                raise httpx.ReadError(f"its answer has more than {MAX_COMPLETION_BYTES:,} bytes")
        return bytes(whole)
    announced = response.headers.get("content-length", "")
    known = min(int(announced), MAX_COMPLETION_BYTES) if announced.isdigit() else 0
    grow(known)
    body = await response.aread()
    grow(max(0, len(body) - known))
    if response.headers.get("content-type") == LINES:
        raise DamagedError(f"the streamed answer has arrived with status {response.status_code}")
    if MESSAGE_DIGEST in response.headers or is_proved(response):
        check_answer(response.request.headers[MESSAGE_DIGEST], response.status_code, response.headers, body)
        if response.status_code == 400 and b'"body_damaged"' in body:
            raise DamagedError(body[:300].decode(errors="replace"))
    return body
