"""Digests of the messages that a server of this package receives and sends (:mod:`embferry.trust.digests`)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.serve.errors import ServeError
from embferry.serve.http.body import discard_body
from embferry.serve.off_loop import off_loop
from embferry.trust.digests import CONTENT_DIGEST, MESSAGE_DIGEST, answer_digest, content_digest, request_digest

DISCARDED_BYTES, DISCARD_SECONDS = 128 << 20, 5.0
"""Bounds on reading the rest of a damaged request: its sender would not see the refusal otherwise."""
_HARMLESS = frozenset({"GET", "HEAD"})


class Digests:
    """ASGI middleware: checks ``Embferry-Digest`` of requests, and adds the digests of whole answers.

    A body is checked by :func:`embferry.serve.http.body.read_body`, against the Content-Digest that
    ``Embferry-Digest`` covers.

    Args:
        app: the application behind.
        respond: makes the response to a damaged request.
        between_parts: returns whether only parts of this project may change something at a path; such requests must
            have the digest. Others are checked if they have it.
        streams: beginnings of paths whose answers have no digests of ours.
    """

    def __init__(
        self,
        app: ASGIApp,
        respond: Callable[[ServeError], Response],
        between_parts: Callable[[str], bool],
        streams: tuple[str, ...] = (),
    ) -> None:
        self._app, self._respond, self._between_parts, self._streams = app, respond, between_parts, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(MESSAGE_DIGEST)
        if not (self._streams and scope["path"].startswith(self._streams)) and scope["method"] != "HEAD":
            send = _Digested(send, given)
        must = scope["method"] not in _HARMLESS and self._between_parts(scope["path"])
        if (given is not None or must) and given != _digest_of(scope):
            await discard_body(receive, DISCARDED_BYTES, DISCARD_SECONDS)
            why = "is missing" if given is None else "does not match what arrived"
            refusal = self._respond(ServeError("body_damaged", f"{MESSAGE_DIGEST} {why}; send the request again"))
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _digest_of(scope: Scope) -> str:
    target: bytes = scope.get("raw_path") or scope["path"].encode()
    if query := scope.get("query_string"):
        target += b"?" + query
    headers = Headers(scope=scope)
    length, content = headers.get("content-length"), headers.get(CONTENT_DIGEST)
    return request_digest(scope["method"], target.decode("latin-1"), length, content)


class _Digested:
    """A ``send`` that holds the head of an answer with a known length, and adds the digests once the body is there.

    An answer with 204 has no body, and no header that says so.
    """

    def __init__(self, send: Send, request: str | None) -> None:
        self._send, self._request = send, request
        self._head: Message | None = None

    async def __call__(self, message: Message) -> None:
        is_start = message["type"] == "http.response.start"
        if is_start and (message["status"] == 204 or "content-length" in Headers(raw=message["headers"])):
            self._head = message
            return
        head, self._head = self._head, None
        if head is not None:
            if not message.get("more_body", False):
                await self._add_digests(head, message.get("body", b""))
            await self._send(head)
        await self._send(message)

    async def _add_digests(self, head: Message, body: bytes) -> None:
        headers = MutableHeaders(raw=[*head["headers"]])
        content = await off_loop(len(body), content_digest, body)
        headers[CONTENT_DIGEST] = content
        if self._request is not None:
            headers[MESSAGE_DIGEST] = answer_digest(self._request, head["status"], content)
        head["headers"] = headers.raw
