"""Items to instances that encode: each to one, all at once; elsewhere if that fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.vllm.connectors import Connector, Encoded, UnfitError
from embferry.serve.vllm.failures import VerbatimError, busy
from embferry.serve.vllm.fleet import Fleet, Instance, Life
from embferry.serve.vllm.intake import Item
from embferry.serve.vllm.metrics import VllmRouterMetrics

log = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
_PASSED_ON = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority")
"""Fields of the request that hold for the encode too."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """A client's request, as far as an encode has to know it. ``headers``: for instances."""

    request: dict[str, Any]
    headers: dict[str, str]

    @property
    def model(self) -> str | None:
        model = self.request.get("model")
        return model if isinstance(model, str) else None


class Encoding:
    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        client: httpx.AsyncClient,
        metrics: VllmRouterMetrics,
        connector: Connector,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._client = client
        self._metrics = metrics
        self._connector = connector

    async def all(
        self, asked: Asked, items: Sequence[Item], language: Instance | None = None, avoid: Collection[str] = ()
    ) -> list[Encoded]:
        """Every item, at the same time. The first that fails ends the others.

        Args:
            language: who is to have them, for connectors that want to know.
            avoid: URLs of encoders that are asked last.

        Raises:
            VerbatimError: an encoder finds the item at fault.
            ServeError: no_worker if none can be reached or has room, worker_failed if all fail.
        """
        return await together(*(self.one(asked, item, language, avoid=avoid) for item in items))

    async def one(
        self,
        asked: Asked,
        item: Item,
        language: Instance | None = None,
        *,
        room: int | None = None,
        avoid: Collection[str] = (),
        never: Collection[Life] = (),
    ) -> Encoded:
        """As :meth:`all`, for one. ``room``: where to offer it; ``never``: encoders that are not asked at all."""
        tried: set[Life] = set(never)
        failed: list[str] = []
        status = 503
        while (encoder := await self._fleet.encoder(item.uuid, asked.model, tried, avoid)) is not None:
            life = encoder.life
            if len(tried) > len(never):
                self._metrics.encode_retries.inc()
            tried.add(life)
            if item.uuid in encoder.encoded:
                self._metrics.affinity_hits.inc()
            try:
                with self._fleet.in_hand(encoder), self._metrics.encode_seconds.time():
                    encoded = await self._at(encoder, life, asked, item, language, room)
            except httpx.TransportError as error:
                failed.append(self._fleet.failed(encoder, error))
                continue
            except UnfitError as error:
                status = status if error.refused else 502
                failed.append(f"{encoder!r}: {error}")
                log.warning("%s", failed[-1])
                self._fleet.suspect(encoder)
                continue
            self._metrics.encodes.inc()
            encoder.remember(item.uuid)
            return encoded
        raise _nobody(failed, self._fleet.encoders, status)

    async def _at(
        self, encoder: Instance, life: Life, asked: Asked, item: Item, language: Instance | None, room: int | None
    ) -> Encoded:
        params, transfer_id = self._connector.asks(language, room)
        body: dict[str, Any] = {name: asked.request[name] for name in _PASSED_ON if name in asked.request}
        body |= {"messages": [{"role": "user", "content": [item.part()]}], "max_tokens": 1, "stream": False}
        body |= {"ec_transfer_params": params} if params else {}
        timeout = httpx.Timeout(self._settings.vllm.encode_timeout, connect=self._settings.router.connect_timeout)
        headers = {**asked.headers, "X-Request-Id": f"{asked.headers['X-Request-Id']}-{item.uuid[:8]}"}
        content = json.dumps(body).encode()
        response = await self._client.post(encoder.url + CHAT, content=content, headers=headers, timeout=timeout)
        if response.status_code != 200:
            if response.status_code < 500 and not busy(response.status_code):
                raise VerbatimError.of(response, response.content)
            why = f"status {response.status_code}: {response.text[:300]}"
            raise UnfitError(why, refused=busy(response.status_code))
        name, entry = _only_entry(response)
        self._connector.check(entry)
        return Encoded(item, encoder, life, name, entry, transfer_id)


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """All results. The first that fails cancels the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def _only_entry(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """Raises UnfitError unless the answer has one entry, for the one item."""
    try:
        ((name, entry),) = response.json()["ec_transfer_params"].items()
        return str(name), dict(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = "the answer has no ec_transfer_params for the item; is it started as ec_producer with a connector?"
        raise UnfitError(why) from error


def _nobody(failed: list[str], encoders: Sequence[Instance], status: int) -> ServeError:
    if failed:
        code = "no_worker" if status == 503 else "worker_failed"
        return ServeError(code, f"the item could not be encoded: {'; '.join(failed)}", retryable=True)
    down = "; ".join(f"{one.url} {one.trouble}" for one in encoders if not one.up) or "all have been tried"
    return ServeError("no_worker", f"no encode instance is there: {down}")
