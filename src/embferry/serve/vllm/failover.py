"""Reports of consumers about embeddings under way: one must come from another encoder, or will not come at all.

A token stands for one item of one request. It cannot be guessed, and is valid only while its request lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object, read_body
from embferry.serve.http.journal import RequestRecord, current_record
from embferry.serve.vllm.client_request import ClientRequest
from embferry.serve.vllm.connectors import KEY, Encoded
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.instance import Incarnation
from embferry.serve.vllm.item_encoder import ItemEncoder
from embferry.serve.vllm.items import Item

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16_384


@dataclass(slots=True)
class Transfer:
    """One item under way to a consumer.

    Attributes:
        left: how often it may still be encoded elsewhere.
        failed: encoders that could not deliver it.
        failure: why it did not arrive, if the consumer has said so.
        lock: held while the item is being encoded again.
        is_encoded: set when it is encoded; the consumer may have been told of it before.
        record: the record of its request.
        context: the context of its request, in which encodes for it run, so that they belong to it.
    """

    request: ClientRequest
    encoded: Encoded
    left: int
    failed: set[Incarnation]
    failure: ServeError | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_encoded: asyncio.Event = field(default_factory=asyncio.Event)
    record: RequestRecord = field(default_factory=current_record)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def was_not_requested(self) -> bool:
        """Whether no encoder offers the item and the consumer has neither asked for it nor reported a failure."""
        return self.failure is None and self.coordinates["endpoint"] is None

    @property
    def coordinates(self) -> dict[str, Any]:
        """A copy of the coordinates that the consumer has."""
        return dict(self.encoded.entry[KEY])

    def set_encoded(self, encoded: Encoded) -> None:
        """The item is encoded, as the consumer was told before."""
        encoded.entry[KEY] = {**encoded.entry[KEY], "failover_token": self.coordinates["failover_token"]}
        self.encoded = encoded
        self.is_encoded.set()


class Failover:
    """The transfers of all requests. :meth:`replace` and :meth:`fail` are HTTP endpoints for consumers."""

    def __init__(self, encoder: ItemEncoder) -> None:
        self._encoder = encoder
        self._failovers = encoder.fleet.settings.vllm.failovers_per_item
        self._metrics = encoder.fleet.metrics
        self._transfers: dict[str, Transfer] = {}
        self._wanted: Counter[str] = Counter()  # the transfers of each item
        self._encoding: dict[str, set[asyncio.Task[Encoded]]] = {}  # the encodes that consumers have asked for, by item

    @contextlib.contextmanager
    def tracked(self, request: ClientRequest, encoded: Sequence[Encoded]) -> Iterator[list[Transfer]]:
        """Puts a token into the coordinates of each item, which is valid while the context lasts.

        Those without a number of tokens are not encoded yet: a report about them waits until they are.
        """
        tokens = {secrets.token_urlsafe(24): one for one in encoded}
        for token, one in tokens.items():
            one.entry[KEY] = {**one.entry[KEY], "failover_token": token}
            self._transfers[token] = transfer = Transfer(request, one, self._failovers, set())
            self._wanted[one.item.uuid] += 1
            if one.entry[KEY]["tokens"] is not None:
                transfer.is_encoded.set()
        try:
            yield [self._transfers[token] for token in tokens]
        finally:
            for token in tokens:
                transfer = self._transfers.pop(token)
                self._let_go(transfer.encoded.item)
                transfer.is_encoded.set()
                if transfer.encoded.repeated:
                    self._metrics.encodes_skipped.inc()

    async def replace(self, request: Request) -> Response:
        """``POST /ec/failovers/{token}``: has the item offered in the same room by another encoder."""
        transfer, told = await self._report(request)
        await transfer.is_encoded.wait()
        if self._transfers.get(request.path_params["token"]) is not transfer:
            raise _unknown()
        async with transfer.lock:
            now = transfer.coordinates["endpoint"]
            if told.get("endpoint", now) == now:  # otherwise it has been replaced already
                await self._replace(transfer, request.path_params["token"], told)
            return JSONResponse({KEY: transfer.coordinates})

    async def _replace(self, transfer: Transfer, token: str, told: dict[str, Any]) -> None:
        old = transfer.encoded
        if transfer.coordinates["endpoint"] is None:  # the consumer was expected to have it, and does not
            await self._encode(transfer, token)
            self._metrics.failovers.labels("not_kept").inc()
            return
        reason = f"[{told.get('code')}] {told.get('message')}"
        if transfer.left <= 0:
            self._metrics.failovers.labels("used_up").inc()
            why = f"the item has been replaced {self._failovers} times (vllm.failovers_per_item); last {reason}"
            raise ServeError("no_worker", why)
        transfer.left -= 1
        transfer.failed.add(old.incarnation)
        new = await self._encode(transfer, token, avoid={old.encoder.url})
        self._metrics.failovers.labels("replaced").inc()
        self._encoder.fleet.journal.event("failover", request=transfer.record, worker=new.encoder.url)
        log.info("replaced an embedding under way: %s", reason, extra={"was": old.encoder.url, "now": new.encoder.url})

    async def _encode(self, transfer: Transfer, token: str, avoid: Collection[str] = ()) -> Encoded:
        """Encodes the item in its room, at an encoder that has not failed."""
        room, old = transfer.coordinates["room"], transfer.encoded
        try:
            new = await self._while_wanted(transfer, avoid)
            if new.entry[KEY]["room"] != room or new.name != old.name:
                raise ServeError("worker_failed", f"{new.encoder!r} offers it in another room; is its version older?")
        except (ServeError, VerbatimError) as error:
            self._metrics.failovers.labels("failed").inc()
            log.warning("an embedding could not be replaced: %s", error)
            raise ServeError("no_worker", f"no other encoder can offer the item: {error}") from error
        new.entry[KEY] = {**new.entry[KEY], "failover_token": token}
        transfer.encoded = new
        return new

    async def _while_wanted(self, transfer: Transfer, avoid: Collection[str]) -> Encoded:
        """Encodes the item, for as long as a request wants it: its own, or another one that waits at a consumer."""
        item, room = transfer.encoded.item, transfer.coordinates["room"]
        if not self._wanted[item.uuid]:
            raise ServeError("not_found", "the request has ended")
        encode = self._encoder.encode(transfer.request, item, room=room, avoid=avoid, never=transfer.failed)
        encoding = asyncio.create_task(encode, context=transfer.context)
        under_way = self._encoding.setdefault(item.uuid, set())
        under_way.add(encoding)
        try:
            await asyncio.wait({encoding})
        finally:
            encoding.cancel()
            under_way.discard(encoding)
        if encoding.cancelled():
            raise ServeError("not_found", "the request has ended")
        return encoding.result()

    def _let_go(self, item: Item) -> None:
        """A request wants an item no more. After the last one, encoders abort."""
        self._wanted[item.uuid] -= 1
        if not self._wanted[item.uuid]:
            del self._wanted[item.uuid]
            for encoding in self._encoding.pop(item.uuid, ()):
                encoding.cancel()

    async def fail(self, request: Request) -> Response:
        """``POST /ec/failures/{token}``: notes why the item will not arrive."""
        transfer, told = await self._report(request)
        retryable = told.get("retryable") is not False
        code, message = str(told.get("code") or "transfer_failed")[:64], str(told.get("message"))[:1000]
        transfer.failure = ServeError(code, message, status=503 if retryable else 502, retryable=retryable)
        return Response(status_code=204)

    async def _report(self, request: Request) -> tuple[Transfer, dict[str, Any]]:
        """Returns the token's transfer and the consumer's report.

        Raises:
            ServeError: not_found, invalid_json, body_too_large, body_damaged.
        """
        body = await read_body(request.scope, request.receive, MAX_BODY_BYTES, between_parts=True)
        transfer = self._transfers.get(request.path_params["token"])
        if transfer is None:
            raise _unknown()
        return transfer, parse_object(body or b"")


def _unknown() -> ServeError:
    return ServeError("not_found", "no request that is being answered has this token")
