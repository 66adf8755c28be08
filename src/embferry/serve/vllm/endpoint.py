"""The base of all paths before vLLM: an instance's refusals as they are, and the headers of requests to instances."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from embferry.serve.config import Settings
from embferry.serve.http.chat import ChatEndpoint, ClientResponse
from embferry.serve.http.errors import retry_after
from embferry.serve.http.journal import current_record
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.fleet import Fleet

log = logging.getLogger(__name__)


class InstanceEndpoint(ChatEndpoint[Fleet]):
    """An endpoint whose requests instances answer."""

    async def respond(self, work: Coroutine[Any, Any, None], response: ClientResponse) -> None:
        try:
            await super().respond(work, response)
        except VerbatimError as refusal:
            self.fleet.metrics.errors.labels("instance").inc()
            current_record().fails("instance")
            log.info("refused by an instance: %s", refusal)
            headers = {"content-type": refusal.content_type} | retry_after(refusal.status)
            await response.send_whole(Response(refusal.body, refusal.status, headers))


def headers_of(scope: Scope, settings: Settings) -> dict[str, str]:
    """Returns the headers for instances: the request's id; the router's own key, or else the client's.

    A key of the router's file is for the router alone, and not passed on.
    """
    given, router = Headers(scope=scope), settings.router
    its_own = given.get("authorization") if router.api_keys_file is None else None
    authorization = f"Bearer {router.api_key.get_secret_value()}" if router.api_key else its_own
    return {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "X-Request-Id": scope["state"]["request_id"],
    } | ({"Authorization": authorization} if authorization else {})


def owner_of(scope: Scope, settings: Settings) -> str:
    """Returns a name of the client under which it alone finds what it has sent.

    That is its API key. Where the router asks for none, it is its address, and the key that it gives for the instances.
    """
    client, router = str(scope["state"]["client"]), settings.router
    if router.api_key is not None or router.api_keys_file is not None:
        return client
    given = Headers(scope=scope).get("authorization", "")
    return f"{client} {hashlib.sha256(given.encode('utf-8', 'surrogatepass')).hexdigest()}"
