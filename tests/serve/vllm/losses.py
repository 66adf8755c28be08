"""Behaviours of instances that are lost, or whose answers are damaged."""

from __future__ import annotations

from typing import Any

import httpx

from embferry.trust.digests import CONTENT_DIGEST, MESSAGE_DIGEST, content_digest
from tests.serve.vllm.stubs import Stub, completion, lost


async def damaged(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    """Sends an answer that does not match its digests."""
    digests = {CONTENT_DIGEST: content_digest(b"another answer"), MESSAGE_DIGEST: 32 * "0"}
    return httpx.Response(200, json=completion("a red circle"), headers=digests)


async def ends(stub: Stub, body: dict[str, Any]) -> httpx.Response:
    """Ends while it has the request."""
    stub.up = False
    return await lost()(stub, body)
