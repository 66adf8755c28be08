"""What consumers tell of embeddings under way: that one must come from elsewhere, or will not come at all.

A token stands for one item of one request, cannot be guessed, and is good only while its request lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from embferry.serve.body import read_body
from embferry.serve.errors import ServeError
from embferry.serve.vllm.connectors import KEY, Encoded
from embferry.serve.vllm.encoding import Asked, Encoding
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.fleet import Life
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.vllm.split import parsed

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16_384


@dataclass(slots=True)
class Transfer:
    """One item under way. ``left``: how often it may still be replaced. ``failure``: why it did not arrive."""

    asked: Asked
    encoded: Encoded
    left: int
    failed: set[Life]
    """Encoders it could not be had from."""
    failure: ServeError | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_silent(self) -> bool:
        """Whether nobody has asked for it though nobody offered it, nor said what became of it."""
        return self.failure is None and self.coordinates["endpoint"] is None

    @property
    def coordinates(self) -> dict[str, Any]:
        return dict(self.encoded.entry[KEY])


class Transfers:
    """Of all requests. ``replace`` and ``fail`` are endpoints."""

    def __init__(self, encoding: Encoding, replacements: int, metrics: VllmRouterMetrics) -> None:
        self._encoding = encoding
        self._replacements = replacements
        self._metrics = metrics
        self._live: dict[str, Transfer] = {}

    @contextlib.contextmanager
    def live(self, asked: Asked, encoded: Sequence[Encoded]) -> Iterator[list[Transfer]]:
        """Gives each item a token, in its coordinates, which is good inside."""
        tokens = {secrets.token_urlsafe(24): one for one in encoded}
        for token, one in tokens.items():
            one.entry[KEY] = {**one.entry[KEY], "replacement": token}
            self._live[token] = Transfer(asked, one, self._replacements, set())
        try:
            yield [self._live[token] for token in tokens]
        finally:
            for token in tokens:
                if self._live.pop(token).encoded.repeated:
                    self._metrics.encodes_skipped.inc()

    async def replace(self, request: Request) -> Response:
        """``POST /ec/replacements/{token}``: the item, in the same room, at another encoder."""
        transfer, told = await self._told(request)
        async with transfer.turn:
            now = transfer.coordinates["endpoint"]
            if told.get("endpoint", now) == now:
                await self._replace(transfer, request.path_params["token"], told)
            return JSONResponse({KEY: transfer.coordinates})  # another endpoint: that one has been replaced already

    async def _replace(self, transfer: Transfer, token: str, told: dict[str, Any]) -> None:
        old = transfer.encoded
        if transfer.coordinates["endpoint"] is None:
            await self._first(transfer, token)
            return
        reason = f"[{told.get('code')}] {told.get('message')}"
        if transfer.left <= 0:
            self._metrics.replacements.labels("used_up").inc()
            why = f"the item has been replaced {self._replacements} times (vllm.replacements_per_item); last {reason}"
            raise ServeError("no_worker", why)
        transfer.left -= 1
        transfer.failed.add(old.life)
        new = await self._encoded(transfer, token, avoid={old.encoder.url})
        self._metrics.replacements.labels("replaced").inc()
        log.info("replaced an embedding under way: %s", reason, extra={"was": old.encoder.url, "now": new.encoder.url})

    async def _first(self, transfer: Transfer, token: str) -> None:
        """It was taken to be there, and is not any more."""
        await self._encoded(transfer, token)
        self._metrics.replacements.labels("not_kept").inc()

    async def _encoded(self, transfer: Transfer, token: str, avoid: Collection[str] = ()) -> Encoded:
        """Has it offered in its room by somebody else than those that failed."""
        room, old = transfer.coordinates["room"], transfer.encoded
        try:
            new = await self._encoding.one(transfer.asked, old.item, room=room, avoid=avoid, never=transfer.failed)
            if new.entry[KEY]["room"] != room or new.name != old.name:
                raise ServeError("worker_failed", f"{new.encoder!r} offers it in another room; is its version older?")
        except (ServeError, VerbatimError) as error:
            self._metrics.replacements.labels("failed").inc()
            log.warning("an embedding could not be replaced: %s", error)
            raise ServeError("no_worker", f"no other encoder has it: {error}") from error
        new.entry[KEY] = {**new.entry[KEY], "replacement": token}
        transfer.encoded = new
        return new

    async def fail(self, request: Request) -> Response:
        """``POST /ec/failures/{token}``: it will not arrive, and why."""
        transfer, told = await self._told(request)
        retryable = told.get("retryable") is not False
        code, message = str(told.get("code") or "transfer_failed")[:64], str(told.get("message"))[:1000]
        transfer.failure = ServeError(code, message, status=503 if retryable else 502, retryable=retryable)
        return Response(status_code=204)

    async def _told(self, request: Request) -> tuple[Transfer, dict[str, Any]]:
        body = await read_body(request.receive, MAX_BODY_BYTES)
        transfer = self._live.get(request.path_params["token"])
        if transfer is None:
            raise ServeError("not_found", "no request that is being answered has this token")
        return transfer, parsed(body or b"")
