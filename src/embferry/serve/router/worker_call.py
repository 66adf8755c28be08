"""One request's calls to two workers: encode, then generate; and their abort if anything fails."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

import httpx
import msgspec

from embferry.discovery.leases import Role, Worker
from embferry.serve.errors import ServeError, from_body
from embferry.serve.http.backends import reason_of
from embferry.serve.router.fleet import Fleet

log = logging.getLogger(__name__)

ABORT_TIMEOUT = 2.0
"""Seconds that a worker may take to accept an abort. What it still holds after that is freed by its own time-outs."""
_NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def draw_room() -> int:
    """Returns a ``bootstrap_room``: 63 random bits, so that two routers do not use the same one."""
    return secrets.randbits(63)


class WorkerCall:
    """Used once: :meth:`encode` if there is media, then :meth:`events`; :meth:`close` in any case.

    Attributes:
        room: None for a request of text alone, which needs no transfer.
        workers: the workers that may hold something for this request.
    """

    def __init__(self, fleet: Fleet, request_id: str, room: int | None) -> None:
        self._fleet = fleet
        self._request_id = request_id
        self.room = room
        self.workers: list[Worker] = []
        self._in_flight = ExitStack()
        self._encoded: dict[str, Any] = {"endpoint": None, "items": []}
        self._ended = False

    async def encode(self, items: list[dict[str, Any]]) -> None:
        """Has the items encoded.

        Raises:
            ServeError: no_worker; any error of the encode worker.
        """
        body = msgspec.msgpack.encode({"room": self.room, "request_id": self._request_id, "items": items})
        headers = {"Content-Type": "application/msgpack"}
        response = await self._first("encode", "/encode", whole=True, content=body, headers=headers)
        try:
            answer = response.json()
            described = answer["items"]
            if len(described) != len(items) or not isinstance(answer["endpoint"], str):
                raise ValueError
            self._encoded = {"endpoint": answer["endpoint"], "items": described}
        except (ValueError, KeyError, TypeError) as error:
            raise ServeError("worker_failed", "the encode worker's answer is malformed") from error

    async def events(self, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yields the language worker's events: ``token`` for each token, then one ``end``.

        Raises:
            ServeError: no_worker; worker_failed if the worker breaks off before the end; any error of the worker.
        """
        body = {"room": self.room, "request_id": self._request_id, "messages": messages, "sampling": sampling}
        body |= self._encoded
        response = await self._first("language", "/generate", json=body)
        try:
            async for line in response.aiter_lines():
                event = _event(line)
                if event["type"] == "error":
                    raise from_body(event, 502)
                if event["type"] == "ping":
                    continue
                self._ended = event["type"] == "end"
                yield event
                if self._ended:
                    return
        except httpx.TransportError as error:
            raise _broke_off("language", error) from error
        finally:
            await response.aclose()
        raise ServeError("worker_failed", "the language worker broke off before the end of the answer")

    async def _first(self, role: Role, path: str, *, whole: bool = False, **body: Any) -> httpx.Response:
        """Returns the response, with status 200, of the first worker that accepts the request.

        A worker that cannot be reached or has no capacity is passed over: nothing has begun there. With ``whole`` the
        response's body is read too, and a worker that breaks off before its end is passed over as well. Without, the
        caller reads the response and closes it.
        """
        failed: list[str] = []
        full: ServeError | None = None
        client = self._fleet.client
        for worker in await self._fleet.candidates(role):
            request = client.build_request("POST", worker.url + path, **body)
            request.headers["X-Request-Id"] = self._request_id
            if worker not in self.workers:
                self.workers.append(worker)
                self._in_flight.enter_context(self._fleet.count_in_flight(worker.id))
            try:
                response = await client.send(request, stream=not whole)
            except httpx.TransportError as error:
                reason = reason_of(error)
                self._fleet.metrics.worker_failures.labels(role).inc()
                log.warning("a worker failed", extra={"worker": worker.id, "url": worker.url, "reason": reason})
                if not (whole or isinstance(error, _NOT_REACHED)):
                    raise _broke_off(role, error) from error
                failed.append(f"{worker.id} at {worker.url}: {reason}")
                continue
            if response.status_code == 200:
                return response
            refusal = await _refusal(response)
            if refusal.http_status != 503:
                raise refusal
            full = refusal
        raise full or ServeError("no_worker", f"no {role} worker can be reached: {'; '.join(failed)}")

    async def close(self) -> None:
        """Releases the workers. Aborts the room there unless the answer came to its end. Never raises."""
        self._in_flight.close()
        if self._ended or self.room is None:
            return
        for worker in self.workers:
            try:
                await self._fleet.client.delete(f"{worker.url}/rooms/{self.room}", timeout=ABORT_TIMEOUT)
            except httpx.HTTPError as error:
                facts = {"worker": worker.id, "reason": reason_of(error)}
                log.warning("a worker could not be told of an abort", extra=facts)


async def _refusal(response: httpx.Response) -> ServeError:
    """Returns the error in a worker's response whose status is not 200."""
    try:
        return from_body(json.loads(await response.aread()), response.status_code)
    except (ValueError, httpx.TransportError):
        return from_body(None, response.status_code)
    finally:
        await response.aclose()


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if event["type"] not in ("token", "end", "error", "ping"):
            raise ValueError
        if event["type"] == "token" and not (isinstance(event["text"], str) and isinstance(event["token_id"], int)):
            raise ValueError
        if event["type"] == "end" and not (
            isinstance(event["finish_reason"], str) and isinstance(event["usage"], dict)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ServeError("worker_failed", f"the language worker sent a malformed event: {line[:200]!r}") from error
    return dict(event)


def _broke_off(role: Role, error: Exception) -> ServeError:
    return ServeError("worker_failed", f"the {role} worker broke off: {reason_of(error)}")
