"""Proofs of the cluster key on the hop between the router and an instance of vLLM.

vLLM's own ``--api-key`` guards some paths only, and proves nothing about the instance. With a cluster key, every path
of an instance but those for monitoring needs a proof, and so does every answer. The proof takes the place of
``Authorization``; what vLLM shall find there travels in :data:`AUTHORIZATION`.
"""

from __future__ import annotations

import httpx
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.protocol.errors import WrongKey
from embferry.serve.http.proofs import OPEN_PATHS, STREAM_SECRET, Proofs, ProvedRequests
from embferry.trust.keys import ClusterKeys
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import INSTANCE

AUTHORIZATION = "Embferry-Authorization"
"""The header with the ``Authorization`` that is meant for vLLM."""
_ADVICE = "vllm serve needs the middleware of docs/vllm.md, and in its environment the router's cluster key"
POLICY_VIOLATION = 1008
"""The code with which a WebSocket is closed."""


class InstanceProofs:
    """ASGI middleware of an instance with a cluster key.

    Args:
        app: the application behind.
        keys: the cluster's.
    """

    def __init__(self, app: ASGIApp, keys: ClusterKeys) -> None:
        self._app = app
        checker = ProofChecker(keys, INSTANCE, "the instance of vLLM")
        self._proved = Proofs(self._with_authorization, checker, OPEN_PATHS.__contains__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # it proves nothing
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        await self._proved(scope, receive, send)

    async def _with_authorization(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get(STREAM_SECRET):
            headers = MutableHeaders(raw=[*scope["headers"]])
            meant = headers.get(AUTHORIZATION)
            del headers["authorization"]
            if meant is not None:
                headers["authorization"] = meant
            scope = {**scope, "headers": headers.raw}
        await self._app(scope, receive, send)


class InstanceProver:
    """The router's end, for one instance.

    Args:
        keys: the cluster's; None: nothing is proved, and an instance that asks for a proof is an error.
        url: the instance's, without a slash at the end.
    """

    def __init__(self, keys: ClusterKeys | None, url: str) -> None:
        self._has_keys = keys is not None
        self._proofs = ProvedRequests(keys, INSTANCE, url)

    async def send(self, client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
        """Sends a request with its proof, and returns the answer with its body unread.

        Raises:
            httpx.TransportError: it cannot be sent, or the answer is not proved.
        """
        meant = request.headers.get("Authorization")
        if self._has_keys and meant is not None:
            request.headers[AUTHORIZATION] = meant
        try:
            return await client.send(request, stream=True, auth=self._proofs)
        except httpx.RemoteProtocolError as error:
            if isinstance(error.__cause__, WrongKey):
                raise httpx.RemoteProtocolError(f"{error}; {_ADVICE}", request=request) from error
            raise


def is_proved(response: httpx.Response) -> bool:
    """Returns whether an answer has a proof, which covers its status and its ``Content-Digest``."""
    return bool(response.request.extensions.get(STREAM_SECRET))
