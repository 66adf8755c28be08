"""Proofs of the cluster key on requests between parts (:mod:`embferry.trust.requests`): for ASGI and for httpx."""

from __future__ import annotations

from collections.abc import Callable, Generator

import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.trust.digests import CONTENT_DIGEST
from embferry.trust.keys import ClusterKeys
from embferry.trust.proof_checker import WHY, ProofChecker
from embferry.trust.requests import (
    MAX_CHALLENGES,
    PROOF_HEADER,
    SCHEME,
    ProvedRequest,
    Prover,
    Refused,
    read_challenge,
)


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
            await JSONResponse({"error": error}, 401, {"WWW-Authenticate": verdict.challenge})(scope, receive, send)
            return
        accepted = verdict

        async def send_proved(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered[PROOF_HEADER] = accepted.answer_proof(message["status"], answered.get(CONTENT_DIGEST))
            await send(message)

        await self._app(scope, receive, send_proved)


def _target(scope: Scope) -> str:
    path: bytes = scope["raw_path"]
    query: bytes = scope["query_string"]
    return (path + b"?" + query if query else path).decode("latin-1")


class ProvedRequests(httpx.Auth):
    """Proves the requests to one server, and checks the proofs of its answers. The caller checks the bodies.

    A failed proof is an ``httpx.RemoteProtocolError``, like any other answer that cannot be used.

    Args:
        keys: The cluster's. None: requests go out without a proof, and a server that asks for one is an error.
        context: What the server is, as it knows it itself.
        health: URL of the server that anyone may ask for.
    """

    def __init__(self, keys: ClusterKeys | None, context: bytes, health: str) -> None:
        self._prover = None if keys is None else Prover(keys.current, context)
        self._health = health

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        prover = self._prover
        if prover is None:
            response = yield request
            if response.status_code == 401 and read_challenge(response.headers.get("WWW-Authenticate")) is not None:
                raise _error("wrong_key", "the server asks for a cluster key, and this end has none", request)
            return
        if not prover.has_nonce:
            # Not with the request itself, which a server without a key would carry out.
            headers, extensions = {"Authorization": SCHEME}, request.extensions
            response = yield httpx.Request("GET", self._health, headers=headers, extensions=extensions)
            if response.status_code == 200:
                raise _error("wrong_key", "the server has no cluster key, and this end has one", request)
            _take_challenge(prover, response, request)
        target = request.url.raw_path.decode("ascii")
        for _ in range(MAX_CHALLENGES):
            proved = prover.prove(request.method, target, request.headers.get(CONTENT_DIGEST))
            request.headers["Authorization"] = proved.authorization
            response = yield request
            if response.status_code != 401:
                _check_proof(proved, response, request)
                return
            _take_challenge(prover, response, request)
        raise _error("proof_required", "the server asks for a new proof again and again", request)


def _take_challenge(prover: Prover, response: httpx.Response, request: httpx.Request) -> None:
    reason = prover.on_challenge(response.headers.get("WWW-Authenticate"))
    if reason is None:
        raise _error("proof_required", f"the server answered {response.status_code} instead of a challenge", request)
    if reason == "wrong_key":
        raise _error("wrong_key", "the server has another cluster key; give both the same key file", request)


def _check_proof(proved: ProvedRequest, response: httpx.Response, request: httpx.Request) -> None:
    digest, proof = response.headers.get(CONTENT_DIGEST), response.headers.get(PROOF_HEADER)
    if not proved.is_answered_by(response.status_code, digest, proof):
        why = f"an answer with status {response.status_code} has no proof of the cluster key"
        raise _error("proof_required", why, request)


def _error(code: str, text: str, request: httpx.Request) -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError(f"[{code}] {text}", request=request)
