"""``GET``, ``HEAD`` and ``DELETE /embeddings/{room}``: the embedding of an open room as bytes, for any HTTP client.

The bytes are the tokens in order, each with its fields in the order of the layout. Token ``t`` begins at byte ``t`` ×
``Embferry-Token-Bytes``, so a download can be resumed at any token (or byte). The entity-tag is the digest of the
content. It is known before the embedding is, so a client that holds a part can tell whether it is still valid.
:mod:`embferry.transports.http.resource` implements statuses and ranges.

The bytes are sent while the encoder runs. A ``GET`` starts the encoder even if no language worker opens the transfer,
and does not change the transfer. The room ends as always: delivered to a language worker, unclaimed, or aborted
(``DELETE``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embferry.disaggregation.queues import SendingEnd
from embferry.protocol.errors import EmbeddingTransferError, LeaseExpired
from embferry.protocol.layout import Layout
from embferry.protocol.states import KVPoll
from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.serve.errors import ServeError
from embferry.serve.http.disconnect import wait_for_disconnect
from embferry.serve.worker.errors import error_response
from embferry.transports.http import resource

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10
"""Bytes copied and sent at a time."""
WAIT_SECONDS = 30.0
"""Seconds to wait for the encoder's next token, or for the client to read what was sent."""
POLL_SECONDS, POLL_LIMIT_SECONDS = 0.002, 0.05
"""First and longest pause between two checks of the encoder's progress."""
METHODS = ("GET", "HEAD", "DELETE")
_ROOM = re.compile(r"\d{1,19}", re.ASCII)


class EmbeddingResource:
    """The ASGI endpoint."""

    def __init__(self, service: EncodeService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        room = self._room(request.path_params["room"])
        headers = {name: ", ".join(request.headers.getlist(name)) for name in request.headers}
        if request.method in ("GET", "HEAD"):
            await self._serve(request, headers, room, receive, send)
            return
        of = resource.Representation(0, etag_of(room), 0, methods=METHODS)
        answer = resource.answer(request.method, headers, of)
        if answer.status == 204 and not self._service.abort_room(room.number):
            raise _unknown(str(room.number))
        await self._response(answer, request, room)(scope, receive, send)

    async def _serve(self, request: Request, headers: dict[str, str], room: Room, receive: Receive, send: Send) -> None:
        if request.method == "GET":
            self._service.claim(room)
        content = _EmbeddingBytes(room, await self._announced(room))
        of = resource.Representation(
            length=content.length,
            etag=etag_of(room),
            ready=content.ready_tokens() * content.token_bytes,
            sha256=await self._sha256(content) if resource.wants_digest(headers) else None,
            methods=METHODS,
            fixed={
                "Cache-Control": "no-store, no-transform",
                "Embferry-Token-Bytes": str(content.token_bytes),
                "Embferry-Tokens": str(content.total_tokens),
                "Embferry-Layout": layout_field(content.layout),
            },
        )
        answer = resource.answer(request.method, headers, of)
        if answer.start == answer.stop:
            await self._response(answer, request, room)(request.scope, receive, send)
            return
        if answer.waits:
            await content.wait_for(answer.start // content.token_bytes + 1)
        await self._stream(content, answer, receive, send)

    def _response(self, answer: resource.Answer, request: Request, room: Room) -> Response:
        """Returns a response without bytes of the embedding."""
        if answer.status < 400:
            return Response(status_code=answer.status, headers=answer.headers)
        refusal = error_response(_refused(request.method, answer.status, room.number))
        refusal.headers.update({name: value for name, value in answer.headers.items() if name != "Content-Length"})
        return refusal

    async def _stream(self, content: _EmbeddingBytes, answer: resource.Answer, receive: Receive, send: Send) -> None:
        room = content.room
        fields = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": fields})
        gone = asyncio.create_task(wait_for_disconnect(receive))
        at = answer.start
        try:
            while at < answer.stop and not gone.done():
                await content.wait_for(at // content.token_bytes + 1)
                chunk = content.read(at, answer.stop)
                at += len(chunk)
                await asyncio.sleep(0)  # lets other tasks run, and ``gone`` see a client that has left
                async with asyncio.timeout(WAIT_SECONDS):
                    await send({"type": "http.response.body", "body": chunk, "more_body": at < answer.stop})
        except (EmbeddingTransferError, TimeoutError) as error:
            # The status has been sent, so the connection ends early. A client that resumes gets the error's status.
            text, extra = "room %d: the download ended at byte %d of %d: %s", {"room": room.number}
            log.warning(text, room.number, at, content.length, error, extra=extra)
        finally:
            gone.cancel()

    def _room(self, number: str) -> Room:
        room = self._service.room(int(number)) if _ROOM.fullmatch(number) else None
        if room is None:
            raise _unknown(number)
        return room

    async def _announced(self, room: Room) -> SendingEnd:
        """Waits until length and digest of the embedding are known, and returns the sender."""
        gone = _unknown(str(room.number))
        why = f"the media were not decoded within {WAIT_SECONDS:g} s; ask again"
        await _wait(
            room,
            lambda: room.sender is not None,
            lambda: None if self._service.room(room.number) is room else gone,
            why,
        )
        assert room.sender is not None
        return room.sender

    async def _sha256(self, content: _EmbeddingBytes) -> bytes | None:
        """Returns the digest of all bytes, or None until all are encoded."""
        if content.ready_tokens() < content.total_tokens:
            return None
        if content.room.sha256 is None:
            content.room.sha256 = await asyncio.to_thread(content.sha256)
        return content.room.sha256


class _EmbeddingBytes:
    """The embedding of a room as one byte string. :attr:`Room.encoded` stays valid after the room has ended."""

    def __init__(self, room: Room, sender: SendingEnd) -> None:
        self.room = room
        self.layout = sender.manager.layout
        self.token_bytes = self.layout.token_bytes
        self.total_tokens = room.total_tokens
        self.length = self.total_tokens * self.token_bytes
        self._sender = sender

    def ready_tokens(self) -> int:
        return self.room.encoded[1]

    async def wait_for(self, tokens: int) -> None:
        """Waits until ``tokens`` are encoded.

        Raises:
            EmbeddingTransferError: the transfer failed, or the encoder took too long.
        """
        why = f"the encoder produced no token for {WAIT_SECONDS:g} s; resume from here"
        await _wait(self.room, lambda: self.ready_tokens() >= tokens, self._failure, why)

    def _failure(self) -> Exception | None:
        return self._sender.failure_exception() if self._sender.poll() is KVPoll.Failed else None

    def read(self, start: int, stop: int) -> bytes:
        """Returns the next chunk of the bytes from ``start`` to ``stop``. The token at ``start`` must be encoded."""
        rows, ready = self.room.encoded
        first = start // self.token_bytes
        last = min(first + max(1, CHUNK_BYTES // self.token_bytes), ready)
        tokens = np.concatenate([rows[field.name][first:last] for field in self.layout.fields], axis=1)
        origin = first * self.token_bytes
        return tokens.reshape(-1)[start - origin : stop - origin].tobytes()

    def sha256(self) -> bytes:
        digest, at = hashlib.sha256(), 0
        while at < self.length:
            chunk = self.read(at, self.length)
            digest.update(chunk)
            at += len(chunk)
        return digest.digest()


async def _wait(
    room: Room, is_done: Callable[[], bool], failure: Callable[[], Exception | None], too_long: str
) -> None:
    """Returns when ``is_done``. Raises the failure, or LeaseExpired after ``WAIT_SECONDS``."""
    until, pause = time.monotonic() + WAIT_SECONDS, POLL_SECONDS
    while not is_done():
        if (error := failure()) is not None:
            raise error
        if time.monotonic() > until:
            raise LeaseExpired(too_long, room=room.number)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, POLL_LIMIT_SECONDS)


def etag_of(room: Room) -> str:
    """Returns the entity-tag of a room's embedding."""
    return f'"{room.digest.hex()}"'


def layout_field(layout: Layout) -> str:
    """Returns the layout as a list of RFC 8941 §3.1: ``"fill_ids";dtype=int32;width=1;offset=128`` (in bytes)."""
    members, offset = [], 0
    for field in layout.fields:
        name = re.sub(r"[^ !#-\[\]-~]", "?", field.name)  # RFC 8941 §3.3.3 strings hold these unescaped
        members.append(f'"{name}";dtype={field.dtype};width={field.width};offset={offset}')
        offset += field.token_bytes
    return ", ".join(members)


def _unknown(number: str) -> ServeError:
    why = "is not open at this worker: it never was, or it has been delivered or aborted"
    return ServeError("not_found", f"room {number[:20]} {why}")


def _refused(method: str, status: int, room: int) -> ServeError:
    code, why = {
        405: ("method_not_allowed", f"an embedding does not support {method}; use {', '.join(METHODS)}"),
        412: ("invalid_request", f"the embedding of room {room} does not match the condition; see its ETag"),
        416: ("invalid_request", f"the range begins after the last byte of room {room}; see Content-Range"),
    }[status]
    return ServeError(code, why, status=status)
