"""A request to a language instance. Nothing goes to the client until the first token, or the whole answer, is here.

vLLM has sent its status 200 and even the role of the answer by the time it finds that an embedding is missing. Then it
sends an error event, or nothing at all. A token proves that the whole prompt, embeddings included, has been
computed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json
from embferry.serve.http.calls import add_digests
from embferry.serve.http.journal import current_record
from embferry.serve.off_loop import off_loop
from embferry.serve.vllm.client_request import CHAT, ClientRequest
from embferry.serve.vllm.failures import EncodeAgainError, LostTwiceError, VerbatimError, is_busy, is_unreachable
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.given_up import REASONS
from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.instance_digests import content_type_of, received_pieces, whole_body
from embferry.trust.bounded_answers import ANSWER_LIMIT, MAX_COMPLETION_BYTES, STREAMED
from embferry.trust.digests import DamagedError, content_digest

log = logging.getLogger(__name__)

BLOCKS_SECONDS = 8.0
"""Seconds for the connection to a decode instance, and within which further ones are tried. A prefill instance keeps
blocks for 30 s, and then as long as the decode instance tells it to; after that, a fetch gets those of others."""
_ROUTER_FIELDS = ("image_embeds", "video_embeds", "enable-mm-embeds", "should contain the fields")
"""Words in a complaint about fields that the router has written, not the client."""


@dataclass(slots=True)
class Answer:
    """An answer that the client may have.

    Attributes:
        rest: the part of the body that comes later; None if ``body`` is complete.
        instance: the instance that answers; None if that does not matter.
        prefilled_by: the instance that has computed the prompt, if that is another one.
    """

    status: int
    content_type: str
    body: bytes
    rest: AsyncIterator[bytes] | None = None
    instance: Instance | None = None
    prefilled_by: Instance | None = None

    @property
    def receiver(self) -> Instance | None:
        """The instance that has received the embeddings of the request."""
        return self.prefilled_by or self.instance


async def ask(
    fleet: Fleet,
    request: ClientRequest,
    content: bytes,
    held: AsyncExitStack,
    *,
    has_media: bool = False,
    first: Instance | None = None,
    only_first: bool = False,
    asked: set[str] | None = None,
    decodes: bool = False,
) -> Answer:
    """Asks one instance after the other until one answers.

    An instance that fails after it has received the request is replaced once, by another one that gets the same body:
    producers still offer the embeddings. A request that ends instances ends two at most.

    Args:
        fleet: the instances.
        request: the client's request.
        content: the body to send.
        held: keeps the connection. The instance aborts an answer that is not complete when it is closed.
        has_media: embeddings have to arrive at the instance first.
        first: the instance to ask first.
        only_first: asks no other one.
        asked: URLs of instances that are asked only if there is no other; gets those that are asked.
        decodes: asks decode instances, and no other one after one that has received the request.

    Raises:
        VerbatimError: the request is wrong, or all instances are busy.
        EncodeAgainError: the instance failed before its first token, or messages arrived damaged twice, and there is no
            other one.
        LostTwiceError: worker_failed or network_damage if a second one fails after it has received the request.
        ServeError: no_worker if no instance can be reached; worker_failed if it does not take embeddings.
    """
    asked = set() if asked is None else asked
    timeout, until = _time_limits(fleet, decodes)
    tried: set[Incarnation] = set()
    damaged: set[Incarnation] = set()
    failed: list[str] = []
    busy: VerbatimError | None = None
    lost: EncodeAgainError | None = None
    is_again = False
    instance = first or await fleet.language(request.model, tried, avoid=asked, decodes=decodes)
    while instance is not None and time.monotonic() < until:
        tried.add(instance.incarnation)
        asked.add(instance.url)
        async with AsyncExitStack() as call:
            call.enter_context(fleet.count_in_flight(instance))
            span = call.enter_context(current_record().asks("language", instance.url, stage=instance.role))
            current_record().phase("answer")
            try:
                async with fleet.unless_stalled(instance):
                    answer = await _ask(fleet, instance, request.under(span), content, has_media, call, timeout)
                held.push_async_exit(call.pop_all())
                return answer
            except httpx.TransportError as error:
                span.end(type(error).__name__)
                what = fleet.failed(instance, error)
                failed.append(what)
                if not is_unreachable(error):
                    lost = _lost(EncodeAgainError("worker_failed", what, of_language=True), lost, decodes, error)
            except DamagedError as error:
                span.end("network_damage")
                what = fleet.damaged(instance, error)
                if instance.incarnation not in damaged and not decodes:
                    damaged.add(instance.incarnation)
                    continue  # the same instance
                failed.append(what)
                lost = _lost(EncodeAgainError("network_damage", what, of_language=True), lost, decodes, error)
            except VerbatimError as refusal:
                if not is_busy(refusal.status) or decodes:
                    raise
                span.end("busy")
                busy = refusal
        instance = None if only_first else await fleet.language(request.model, tried, avoid=asked, decodes=decodes)
        if instance is not None and lost is not None and not is_again:
            is_again = True
            log.warning("asking another instance: %s", lost.detail)
            fleet.metrics.second_attempts.inc()
            current_record().begins_again(lost.code, "")
    if only_first and lost is None and busy is None:
        raise EncodeAgainError("no_worker", f"{first!r} cannot be reached", of_language=True)
    raise lost or busy or unavailable(fleet, failed, decodes=decodes)


def _time_limits(fleet: Fleet, decodes: bool) -> tuple[httpx.Timeout, float]:
    """Returns the time limits of one request, and the time (monotonic) until which further instances are asked."""
    if not decodes:
        return fleet.client.timeout, math.inf
    connect = min(fleet.settings.router.connect_timeout, BLOCKS_SECONDS)
    return httpx.Timeout(None, connect=connect, pool=BLOCKS_SECONDS), time.monotonic() + BLOCKS_SECONDS


def _lost(
    error: EncodeAgainError, earlier: EncodeAgainError | None, decodes: bool, cause: Exception
) -> EncodeAgainError:
    """Returns the loss of an instance that had received the request, if another one may be asked.

    Raises:
        EncodeAgainError: not by a request that decodes: its blocks may have been fetched.
        LostTwiceError: it is the second loss.
    """
    if decodes:
        raise error from cause
    if earlier is not None:
        why = f"{error.detail} (before that: {earlier.detail})"
        raise LostTwiceError(error.code, why, status=error.http_status, retryable=error.retryable) from cause
    return error


def unavailable(fleet: Fleet, failed: Sequence[str] = (), *, decodes: bool = False) -> ServeError:
    """Returns the error of a request for which no instance is left. ``failed``: the failures of those that it asked."""
    instances, role = (fleet.decoders, "decode") if decodes else (fleet.languages, fleet.receiving)
    down = failed or [f"{one.url} {one.trouble}" for one in instances if not one.up] or ["none serves the model"]
    return ServeError("no_worker", f"no {role} instance is available: {'; '.join(down)}")


async def _ask(
    fleet: Fleet,
    instance: Instance,
    request: ClientRequest,
    content: bytes,
    has_media: bool,
    call: AsyncExitStack,
    timeout: httpx.Timeout,
) -> Answer:
    post = fleet.client.build_request(
        "POST",
        instance.url + CHAT,
        content=content,
        headers=request.headers,
        timeout=timeout,
        extensions={ANSWER_LIMIT: MAX_COMPLETION_BYTES, STREAMED: True},
    )
    add_digests(post, await off_loop(len(content), content_digest, content))
    response = await fleet.send(instance, post)
    call.push_async_callback(response.aclose)
    content_type = content_type_of(response)
    if response.status_code == 200 and content_type.startswith("text/event-stream"):
        events = received_pieces(response)
        seen = await _read_to_first_token(instance, events, request.content)
        return Answer(200, content_type, seen, events, instance)
    body = await whole_body(response, request.grow)
    if response.status_code != 200:
        if fleet.is_refused(response.status_code):
            raise EncodeAgainError("worker_failed", f"{instance!r} refuses the router's API key")
        raise _refusal(instance, response, body, has_media)
    await off_loop(len(body), _check_complete, instance, body)
    return Answer(200, content_type, body, None, instance)


async def _read_to_first_token(instance: Instance, events: AsyncIterator[bytes], request: dict[str, Any]) -> bytes:
    """Returns the bytes up to the first event with a token, that event included.

    Raises:
        EncodeAgainError, VerbatimError: there is no token.
    """
    seen, parsed = bytearray(), 0
    echoes = _choices(request) if request.get("echo") is True else 0
    async for piece in events:
        seen += piece
        if len(seen) > MAX_COMPLETION_BYTES:
            raise EncodeAgainError("worker_failed", f"{instance!r} sent {len(seen):,} bytes without a token")
        while (end := seen.find(b"\n\n", parsed)) >= 0:
            chunk = _parse_event(bytes(seen[parsed:end]))
            parsed = end + 2
            if chunk is None:
                continue
            if "error" in chunk:
                raise _error_event(instance, chunk)
            has_text = _has_text(instance, chunk)
            if has_text and echoes > 0:  # the request's own last message
                echoes -= 1
            elif has_text:
                return bytes(seen)
    raise EncodeAgainError("worker_failed", f"{instance!r} ended its answer before the first token")


def _choices(request: dict[str, Any]) -> int:
    """Returns the number of answers to a request. vLLM takes a number that is written in a string, too."""
    try:
        return int(request.get("n") or 1)
    except (TypeError, ValueError):
        return 1


def _parse_event(text: bytes) -> dict[str, Any] | None:
    """Returns the JSON object of a server-sent event; None for a comment and for ``[DONE]``."""
    if not text.startswith(b"data:"):
        return None
    try:
        value = read_json(text[5:])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _has_text(instance: Instance, chunk: dict[str, Any]) -> bool:
    """Returns whether a chunk has text. The first chunk of an answer has only the role."""
    try:
        for choice in chunk.get("choices") or ():
            reason = choice.get("finish_reason")
            if reason in REASONS:
                raise _given_up(instance, f"finish_reason {reason!r}")
            if reason is not None or "role" not in (choice.get("delta") or {}):
                return True
    except (AttributeError, TypeError) as error:
        raise EncodeAgainError("worker_failed", f"{instance!r} sent a malformed event") from error
    return False


def _check_complete(instance: Instance, body: bytes) -> None:
    """Raises EncodeAgainError if the body is no completion, or an unfinished one."""
    try:
        reasons = [choice["finish_reason"] for choice in read_json(body)["choices"]]
        unfinished = [reason for reason in reasons if reason in REASONS]
    except (ValueError, KeyError, TypeError) as error:
        why = f"the answer of {instance!r} is no completion"
        raise EncodeAgainError("worker_failed", why) from error
    if not reasons:
        raise _given_up(instance, "no choices")
    if unfinished:
        raise _given_up(instance, f"finish_reason {unfinished[0]!r}")


def _given_up(instance: Instance, why: str) -> EncodeAgainError:
    return EncodeAgainError("worker_failed", f"{instance!r} has given up: {why}")


def _error_event(instance: Instance, chunk: dict[str, Any]) -> Exception:
    """Returns the exception for an error event in place of the first token."""
    error = chunk["error"] if isinstance(chunk["error"], dict) else {}
    status = error.get("code")
    if isinstance(status, int) and 400 <= status < 500:
        return VerbatimError(status, "application/json", json.dumps(chunk).encode())
    return EncodeAgainError("worker_failed", f"{instance!r} failed: {error.get('message')}")


def _refusal(instance: Instance, response: httpx.Response, body: bytes, has_media: bool) -> Exception:
    status, text = response.status_code, body[:500].decode(errors="replace")
    if status < 500 and has_media and any(word in text for word in _ROUTER_FIELDS):
        why = f"{instance!r} does not take embeddings ({text}); is it started as ec_consumer with the connector?"
        return ServeError("worker_failed", why, retryable=False)  # until the instance is started differently
    if 400 <= status < 500 or is_busy(status):
        return VerbatimError.of(response, body)
    return EncodeAgainError("worker_failed", f"{instance!r} failed with status {status}: {text}")
