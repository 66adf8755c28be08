"""Proofs of the cluster key on requests between parts (:mod:`embferry.trust.requests`): for ASGI and for httpx."""

from __future__ import annotations

from collections.abc import Callable, Generator

import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.protocol.errors import TransportError
from embferry.trust.digests import CONTENT_DIGEST, MESSAGE_DIGEST, LineReader, LineWriter
from embferry.trust.keys import ClusterKeys
from embferry.trust.proof_checker import WHY, ProofChecker
from embferry.trust.proved_call import GREETING_PATH, proved_call
from embferry.trust.requests import PROOF_HEADER, SCHEME, Prover, Refused

STREAM_SECRET = "embferry_stream_secret"
"""Key of an ASGI scope, and of the extensions of an httpx request."""
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Paths of workers for monitoring, which proves nothing."""


def worker_context(worker_id: str) -> bytes:
    """Returns what the proofs of requests to a worker cover beside them."""
    return b"worker " + worker_id.encode()


class Proofs:
    """An application whose requests need a proof. Its answers to them have one.

    A proof covers the ``Content-Digest`` of the request; ``app`` compares that with the body.

    Args:
        app: Gets the requests that are proved, or need no proof.
        checker: Checks proofs.
        is_open: Returns whether requests for a path need no proof.
    """

    def __init__(self, app: ASGIApp, checker: ProofChecker, is_open: Callable[[str], bool]) -> None:
        self._app, self._checker, self._is_open = app, checker, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        authorization = headers.get("authorization", "")
        if self._is_open(scope["path"]) and not authorization.startswith(SCHEME):
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("an unknown address",))[0]
        verdict = self._checker.check(
            scope["method"], _target(scope), authorization, headers.get(CONTENT_DIGEST), address
        )
        if isinstance(verdict, Refused):
            error = {"code": verdict.reason, "message": WHY[verdict.reason]}
            # The body is not read: it may be long, and nothing is spent on strangers.
            ends = {"Connection": "close"} if _has_body(headers) else {}
            refusal = JSONResponse({"error": error}, 401, {"WWW-Authenticate": verdict.challenge, **ends})
            await refusal(scope, receive, send)
            return
        accepted = verdict
        scope = {**scope, STREAM_SECRET: accepted.stream_secret()}

        async def send_proved(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered[PROOF_HEADER] = accepted.answer_proof(message["status"], answered.get(CONTENT_DIGEST))
            await send(message)

        await self._app(scope, receive, send_proved)


def line_writer(scope: Scope) -> LineWriter:
    """Returns the writer of a streamed answer to a request."""
    return LineWriter(scope.get(STREAM_SECRET, "") + Headers(scope=scope).get(MESSAGE_DIGEST, ""))


def line_reader(request: httpx.Request) -> LineReader:
    """Returns the reader of a streamed answer to a request."""
    return LineReader(request.extensions.get(STREAM_SECRET, "") + request.headers[MESSAGE_DIGEST])


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (path + b"?" + query if query else path).decode("latin-1")


class ProvedRequests(httpx.Auth):
    """Proves the requests to one server, and checks the proofs of its answers. The caller checks the bodies.

    A failed proof is an ``httpx.RemoteProtocolError``, like any other answer that cannot be used.

    Args:
        keys: The cluster's. None: requests go out without a proof, and a server that asks for one is an error.
        context: What the server is, as it knows it itself.
        server: Its URL, without a slash at the end.
    """

    def __init__(self, keys: ClusterKeys | None, context: bytes, server: str) -> None:
        self._prover = None if keys is None else Prover(keys.current, context)
        self._server = server

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        target, digest = request.url.raw_path.decode("ascii"), request.headers.get(CONTENT_DIGEST)
        call = proved_call(self._prover, request.method, target, digest, self._server)
        attempt = next(call)
        while True:
            sent = request
            if attempt.is_greeting:
                sent = httpx.Request("GET", self._server + GREETING_PATH, extensions=request.extensions)
            if attempt.authorization is not None:
                sent.headers["Authorization"] = attempt.authorization
            sent.extensions = {**sent.extensions, STREAM_SECRET: attempt.stream_secret}
            response = yield sent
            try:
                attempt = call.send((response.status_code, response.headers.get))
            except StopIteration:
                return
            except TransportError as error:
                raise httpx.RemoteProtocolError(str(error), request=request) from error
