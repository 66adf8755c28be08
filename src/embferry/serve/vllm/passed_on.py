"""The paths that are passed on to an instance as they are: they have texts alone, so nothing is encoded elsewhere.

A picture or another file in them is refused. The instance would fetch its URL itself, past the router's checks. What
:mod:`.responses` takes out before is no such file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.responses import Response
from starlette.types import Scope

from embferry.serve.errors import ServeError
from embferry.serve.http.backends import reason_of
from embferry.serve.http.calls import add_digests
from embferry.serve.http.chat import ClientResponse, Incoming
from embferry.serve.http.journal import current_record
from embferry.serve.http.request_trace import Call
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.ignored import Ignored
from embferry.serve.text_limit import check_characters, count_characters
from embferry.serve.vllm.client_request import ClientRequest
from embferry.serve.vllm.endpoint import InstanceEndpoint, headers_of
from embferry.serve.vllm.failures import VerbatimError, is_busy, is_unreachable
from embferry.serve.vllm.fields import ignored_fields
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.given_up import check_not_given_up, unless_given_up
from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.instance_digests import content_type_of, received_pieces, whole_body
from embferry.serve.vllm.media_parts import MediaPart, parse_request
from embferry.trust.bounded_answers import ANSWER_LIMIT, MAX_COMPLETION_BYTES, STREAMED
from embferry.trust.digests import DamagedError, content_digest

PATHS = ("/v1/completions", "/tokenize", "/detokenize")
_FILES = frozenset({
    "image_url", "video_url", "audio_url", "file_url", "input_audio", "file_data", "file_id", "file", "image", "video",
    "audio", "image_embeds", "video_embeds", "audio_embeds", "image_pil", "prompt_embeds", "url",
})  # fmt: skip
"""Fields of an input that hold a file, or say where it is."""
_INPUTS = ("input", "messages", "prompt", "previous_input_messages")
_PARTS = ("content", "output")
"""Fields with lists of parts."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was read.

    Attributes:
        request: the whole.
        characters: the number of those of its texts.
        ignored: the fields that have no effect.
        is_changed: it is not what the client has sent.
        pictures: those of its input.
    """

    request: dict[str, Any]
    characters: int
    ignored: Ignored
    is_changed: bool
    pictures: Sequence[MediaPart] = ()


class PassedOn(InstanceEndpoint):
    """One of the paths.

    Args:
        fleet: the instances.
        path: of the router and of the instances.
    """

    def __init__(self, fleet: Fleet, path: str) -> None:
        super().__init__(fleet)
        self._path = path

    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        body = incoming.take()
        asked = await off_loop(JSON_WEIGHT * len(body), self._read, body)
        response.note_ignored(asked.ignored)
        streams = asked.request.get("stream") is True
        current_record().describe(streams=streams, kinds=[part.kind for part in asked.pictures])
        request = ClientRequest(asked.request, headers_of(scope, self._settings), len(body), incoming.hold.add)
        check_characters(asked.characters, self.fleet.text_limits(request.model))
        body = await self._prepared(request, asked, body)
        digest = await off_loop(len(body), content_digest, body)
        async with AsyncExitStack() as held:
            instance, received = await self._first(request.model, body, digest, request.headers, held)
            await self._forward(instance, received, response)

    def _read(self, body: bytes) -> Asked:
        """Returns what a client asks. Called on a thread."""
        request = parse_request(body)
        ignored = ignored_fields(request, self._path)
        is_changed = strip_names(request)
        check_files(request)
        return Asked(request, count_characters(request), ignored, is_changed)

    async def _prepared(self, request: ClientRequest, asked: Asked, body: bytes) -> bytes:
        """Returns the body that an instance gets."""
        return await request.as_json(asked.request, ()) if asked.is_changed else body

    async def _first(
        self, model: str | None, body: bytes, digest: str, headers: dict[str, str], held: AsyncExitStack
    ) -> tuple[Instance, httpx.Response]:
        """Returns the first instance that can be reached and has capacity, and its response.

        One that fails after it has received the request, and before it responds, is replaced once.

        Raises:
            VerbatimError: all instances are busy.
            ServeError: no_worker; worker_failed.
        """
        tried: set[Incarnation] = set()
        failed: list[str] = []
        busy: VerbatimError | None = None
        lost = ""
        while (instance := await self.fleet.language(model, tried)) is not None:
            tried.add(instance.incarnation)
            async with AsyncExitStack() as call:
                call.enter_context(self.fleet.count_in_flight(instance))
                span = current_record().asks("language", instance.url)
                call.enter_context(span)
                current_record().phase("answer")
                try:
                    async with self.fleet.unless_stalled(instance):
                        received = await self._send(instance, body, digest, headers, span)
                        call.push_async_callback(received.aclose)
                        if is_busy(received.status_code):
                            span.end("busy")
                            busy = VerbatimError.of(received, await whole_body(received))
                            continue
                    held.push_async_exit(call.pop_all())
                    return instance, received
                except httpx.TransportError as error:
                    span.end(type(error).__name__)
                    failed.append(self.fleet.failed(instance, error))
                    if not is_unreachable(error):
                        if lost:
                            raise ServeError("worker_failed", f"{failed[-1]} (before that: {lost})") from error
                        lost = failed[-1]
                except DamagedError as error:
                    span.end("network_damage")
                    failed.append(self.fleet.damaged(instance, error))
        if lost:
            raise ServeError("worker_failed", "; ".join(failed))
        if busy is not None:
            raise busy
        why = "; ".join(failed or self.fleet.missing()) or f"no {self.fleet.receiving} instance is available"
        raise ServeError("no_worker", why)

    async def _send(
        self, instance: Instance, body: bytes, digest: str, headers: dict[str, str], call: Call
    ) -> httpx.Response:
        extensions = {ANSWER_LIMIT: MAX_COMPLETION_BYTES, STREAMED: True}
        url = instance.url + self._path
        post = self.fleet.client.build_request("POST", url, content=body, headers=headers, extensions=extensions)
        if call.headers:
            post.headers.update(call.headers)
        return await self.fleet.send(instance, add_digests(post, digest))

    async def _forward(self, instance: Instance, received: httpx.Response, response: ClientResponse) -> None:
        """Sends an instance's response to the client.

        Raises:
            VerbatimError: the instance refuses the request.
            ServeError: worker_failed; network_damage.
        """
        status, content_type = received.status_code, content_type_of(received)
        try:
            async with self.fleet.unless_stalled(instance):
                if status == 200 and content_type.startswith("text/event-stream"):
                    await response.start(200, [(b"content-type", content_type.encode())])
                    async for piece in unless_given_up(instance, received_pieces(received)):
                        await response.write(piece)
                    await response.write(b"", more=False)
                    return
                body = await whole_body(received)
        except httpx.TransportError as error:
            raise ServeError("worker_failed", f"{instance!r} broke off: {reason_of(error)}") from error
        except DamagedError as error:
            raise ServeError("network_damage", f"the answer of {instance!r} arrived damaged: {error}") from error
        if self.fleet.is_refused(status):
            raise ServeError("worker_failed", f"{instance!r} refuses the router's API key")
        if 400 <= status < 500:
            raise VerbatimError.of(received, body)
        if status != 200:
            text = body[:500].decode(errors="replace")
            raise ServeError("worker_failed", f"{instance!r} failed with status {status}: {text}")
        check_not_given_up(instance, body)
        await response.send_whole(Response(body, 200, {"content-type": content_type}))


def check_files(request: dict[str, Any]) -> None:
    """Checks that a request has neither files nor addresses to which an instance would connect.

    Raises:
        ServeError: unsupported_value.
    """
    for name in _INPUTS:
        if (found := _file_in(request.get(name))) is not None:
            why = f"{name} has a file ({found}) that this path does not take; send files to /v1/chat/completions"
            raise ServeError("unsupported_value", why, param=name)
    tools = request.get("tools")
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and tool.get("server_url") is not None:
            at = f"tools[{number}].server_url"
            raise ServeError("unsupported_value", f"{at} cannot come from a client: the server would call it", param=at)


def strip_names(request: dict[str, Any]) -> bool:
    """Removes the ``uuid`` of every part: vLLM would look it up in a cache that all clients share.

    Returns:
        Whether there was one.
    """
    left = [request.get(name) for name in _INPUTS]
    was_named = False
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            for name in _PARTS:
                for part in one[name] if isinstance(one.get(name), list) else ():
                    was_named |= isinstance(part, dict) and part.pop("uuid", None) is not None
            left += one.values()
    return was_named


def _file_in(value: Any) -> str | None:
    """Returns the name of a field with a file, anywhere in a value; None if there is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            if found := [str(name) for name in one if name in _FILES and one[name] is not None]:
                return found[0]
            left += one.values()
    return None
