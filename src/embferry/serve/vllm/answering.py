"""A request to an instance that answers. Its head is held back until its first token, or its whole answer, is here.

vLLM has sent its 200 and even the role of the answer by the time it finds that an embedding cannot be had; what follows
is an error event, or nothing at all. So what counts is a token: it comes after the whole prompt, embeddings included,
has been computed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from embferry.serve.errors import ServeError
from embferry.serve.vllm.encoding import CHAT
from embferry.serve.vllm.failures import AgainError, VerbatimError, busy, unreachable
from embferry.serve.vllm.fleet import Fleet, Instance, Life

_UNFINISHED = ("error", "abort")
"""Of vLLM's reasons to finish, those that no client has asked for."""
_OURS = ("image_embeds", "video_embeds", "enable-mm-embeds", "should contain the fields")
"""In a complaint about what the router wrote, not the client."""


@dataclass(slots=True)
class Begun:
    """An answer that has come far enough to be told. ``rest``: what of its body comes later; None if nothing does.
    ``by``: whose it is; None: the router's own.
    """

    status: int
    content_type: str
    body: bytes
    rest: AsyncIterator[bytes] | None
    by: Instance | None = None


class Answering:
    """One request's talk with instances that answer; :meth:`close` in any case."""

    def __init__(self, fleet: Fleet, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self._fleet = fleet
        self._client = client
        self._headers = headers
        self._open = AsyncExitStack()

    async def close(self) -> None:
        """Lets go of the instance, which gives up an answer that is not complete."""
        await self._open.aclose()

    async def ask(
        self,
        content: bytes,
        request: dict[str, Any],
        *,
        media: bool,
        first: Instance | None = None,
        alone: bool = False,
    ) -> Begun:
        """Args:
            content: the body to send; ``request``: the client's, for its ``stream``, ``echo`` and ``n``.
            media: whether embeddings have to arrive there first.
            first: the instance to ask first; if ``alone``, no other one.

        Raises:
            VerbatimError: the request is at fault, or all instances are busy.
            AgainError: it failed before anything could be told.
            ServeError: no_worker if none can be reached; worker_failed if one does not take embeddings.
        """
        model = request.get("model")
        tried: set[Life] = set()
        failed: list[str] = []
        full: VerbatimError | None = None
        while (instance := await self._next(model, tried, first, alone)) is not None:
            tried.add(instance.life)
            self._open.enter_context(self._fleet.in_hand(instance))
            try:
                return await self._at(instance, content, request, media)
            except httpx.TransportError as error:
                what = self._fleet.failed(instance, error)
                if not unreachable(error):
                    raise AgainError("worker_failed", what, retryable=True) from error
                failed.append(what)
            except VerbatimError as refusal:
                if not busy(refusal.status):
                    raise
                full = refusal
            await self.close()
        if full is not None:
            raise full
        if alone:
            raise AgainError("no_worker", f"{first!r} cannot be reached", retryable=True)
        down = failed or [f"{one.url} {one.trouble}" for one in self._fleet.languages if not one.up]
        raise ServeError("no_worker", f"no language instance is there: {'; '.join(down)}")

    async def _next(self, model: Any, tried: set[Life], first: Instance | None, alone: bool) -> Instance | None:
        if first is not None and (alone or not tried):
            return None if first.life in tried else first
        return await self._fleet.language(model if isinstance(model, str) else None, tried)

    async def _at(self, instance: Instance, content: bytes, request: dict[str, Any], media: bool) -> Begun:
        call = self._client.build_request("POST", instance.url + CHAT, content=content, headers=self._headers)
        response = await self._client.send(call, stream=True)
        self._open.push_async_callback(response.aclose)
        content_type = response.headers.get("content-type", "")
        if response.status_code == 200 and content_type.startswith("text/event-stream"):
            events = response.aiter_raw()
            seen = await _until_a_token(instance, events, request)
            return Begun(200, content_type, seen, events, instance)
        body = await response.aread()
        if response.status_code != 200:
            raise _refusal(instance, response, body, media)
        _check_whole(instance, body)
        return Begun(200, content_type, body, None, instance)


async def _until_a_token(instance: Instance, events: AsyncIterator[bytes], request: dict[str, Any]) -> bytes:
    """What has come until the first event with a token in it, that included.

    Raises:
        AgainError, VerbatimError: it does not come.
    """
    seen, looked = bytearray(), 0
    echoes = (request.get("n") or 1) if request.get("echo") is True else 0
    async for piece in events:
        seen += piece
        while (end := seen.find(b"\n\n", looked)) >= 0:
            chunk = _event(bytes(seen[looked:end]))
            looked = end + 2
            if chunk is None:
                continue
            if "error" in chunk:
                raise _told_late(instance, chunk)
            told = _tells(instance, chunk)
            if told and echoes > 0:  # the request's own last message
                echoes -= 1
            elif told:
                return bytes(seen)
    raise AgainError("worker_failed", f"{instance!r} ended its answer before the first token", retryable=True)


def _event(text: bytes) -> dict[str, Any] | None:
    """The JSON of a server-sent event; None for a comment and for ``[DONE]``."""
    if not text.startswith(b"data:"):
        return None
    try:
        value = json.loads(text[5:])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _tells(instance: Instance, chunk: dict[str, Any]) -> bool:
    """Whether a chunk has something that was generated. The first of an answer only says whose role it is."""
    for choice in chunk.get("choices") or ():
        reason = choice.get("finish_reason")
        if reason in _UNFINISHED:
            raise AgainError("worker_failed", f"{instance!r} has given up: finish_reason {reason!r}", retryable=True)
        if reason is not None or "role" not in (choice.get("delta") or {}):
            return True
    return False


def _check_whole(instance: Instance, body: bytes) -> None:
    try:
        reasons = [choice["finish_reason"] for choice in json.loads(body)["choices"]]
    except (ValueError, KeyError, TypeError) as error:
        raise AgainError("worker_failed", f"{instance!r} answered with no completion", retryable=True) from error
    if not reasons or (ends := [reason for reason in reasons if reason in _UNFINISHED]):
        what = f"finish_reason {ends[0]!r}" if reasons else "no choices"
        raise AgainError("worker_failed", f"{instance!r} has given up: {what}", retryable=True)


def _told_late(instance: Instance, chunk: dict[str, Any]) -> Exception:
    """An error event instead of a first token."""
    error = chunk["error"] if isinstance(chunk["error"], dict) else {}
    status = error.get("code")
    if isinstance(status, int) and 400 <= status < 500:
        return VerbatimError(status, "application/json", json.dumps(chunk).encode())
    return AgainError("worker_failed", f"{instance!r} failed: {error.get('message')}", retryable=True)


def _refusal(instance: Instance, response: httpx.Response, body: bytes, media: bool) -> Exception:
    status, text = response.status_code, body[:500].decode(errors="replace")
    if status < 500 and media and any(word in text for word in _OURS):
        why = f"{instance!r} does not take embeddings ({text}); is it started as ec_consumer with the connector?"
        return ServeError("worker_failed", why, retryable=False)
    if status < 500 or busy(status):
        return VerbatimError.of(response, body)
    return AgainError("worker_failed", f"{instance!r} failed with status {status}: {text}", retryable=True)
