"""``GET``, ``HEAD`` and ``DELETE /embeddings/{room}``: the embedding of an open room as bytes, for any HTTP client.

Token after token, of each its fields in the order of the layout, so that token ``t`` begins at byte ``t`` ×
``Embferry-Token-Bytes`` and a download can be resumed at any token (or byte). The entity-tag is the digest of the
content, and known before the embedding is: whoever has a part of it can tell whether it is still the same. What
statuses and ranges mean: :mod:`embferry.transports.http.resource`.

The bytes go out as they are made. Asking for them is reason enough to make them; whether a language worker asks for the
transfer beside that makes no difference. The room ends as ever: delivered to one, unclaimed, or aborted (``DELETE``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embferry.protocol.errors import EmbeddingTransferError, LeaseExpired
from embferry.protocol.layout import Layout
from embferry.protocol.states import KVPoll
from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.serve.errors import ServeError
from embferry.serve.worker.errors import error_response
from embferry.serve.worker.http import disconnected
from embferry.transfer.fields import Fields
from embferry.transfer.send_handle import EmbeddingSender
from embferry.transports.http import resource

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10
"""Copied at a time, whatever the length of the embedding."""
WAIT_SECONDS = 30.0
"""For the encoder to make the next token, or for the client to take what was sent."""
LOOK_SECONDS, LOOK_LIMIT_SECONDS = 0.002, 0.05
"""Between two looks at how far the encoder is."""
METHODS = ("GET", "HEAD", "DELETE")
_ROOM = re.compile(r"\d{1,19}", re.ASCII)


class Embeddings:
    """The ASGI endpoint.

    :param wait_seconds: see WAIT_SECONDS.
    """

    def __init__(self, service: EncodeService, wait_seconds: float = WAIT_SECONDS) -> None:
        self._service = service
        self._wait_seconds = wait_seconds
        self._digests: WeakKeyDictionary[Room, bytes] = WeakKeyDictionary()

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
        await self._answer(answer, request, room)(scope, receive, send)

    async def _serve(self, request: Request, headers: dict[str, str], room: Room, receive: Receive, send: Send) -> None:
        if request.method == "GET":
            self._service.claim(room)
        bytes_of = _Bytes(room, await self._announced(room), self._wait_seconds)
        of = resource.Representation(
            length=bytes_of.length,
            etag=etag_of(room),
            ready=bytes_of.ready_tokens() * bytes_of.token_bytes,
            sha256=await self._sha256(bytes_of) if resource.wants_digest(headers) else None,
            methods=METHODS,
            fixed={
                "Cache-Control": "no-store, no-transform",
                "Embferry-Token-Bytes": str(bytes_of.token_bytes),
                "Embferry-Tokens": str(bytes_of.total_tokens),
                "Embferry-Layout": layout_field(bytes_of.layout),
            },
        )
        answer = resource.answer(request.method, headers, of)
        if answer.start == answer.stop:
            await self._answer(answer, request, room)(request.scope, receive, send)
            return
        if answer.waits:
            await bytes_of.until(answer.start // bytes_of.token_bytes + 1)
        await self._stream(bytes_of, answer, receive, send)

    def _answer(self, answer: resource.Answer, request: Request, room: Room) -> Response:
        """One without bytes of the embedding."""
        if answer.status < 400:
            return Response(status_code=answer.status, headers=answer.headers)
        refusal = error_response(_refused(request.method, answer.status, room.number))
        refusal.headers.update({name: value for name, value in answer.headers.items() if name != "Content-Length"})
        return refusal

    async def _stream(self, bytes_of: _Bytes, answer: resource.Answer, receive: Receive, send: Send) -> None:
        fields = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": fields})
        gone = asyncio.create_task(disconnected(receive))
        at = answer.start
        try:
            while at < answer.stop and not gone.done():
                await bytes_of.until(at // bytes_of.token_bytes + 1)
                chunk = bytes_of.read(at, answer.stop)
                at += len(chunk)
                await asyncio.sleep(0)  # others, and the news that the client has left, get their turn
                async with asyncio.timeout(self._wait_seconds):
                    await send({"type": "http.response.body", "body": chunk, "more_body": at < answer.stop})
        except (EmbeddingTransferError, TimeoutError) as error:
            # Too late for a status: the connection ends early, and the client resumes or finds out why.
            log.warning("room %d: the download ended at byte %d of %d: %s", bytes_of.room, at, bytes_of.length, error)
        finally:
            gone.cancel()

    def _room(self, number: str) -> Room:
        room = self._service.room(int(number)) if _ROOM.fullmatch(number) else None
        if room is None:
            raise _unknown(number)
        return room

    async def _announced(self, room: Room) -> EmbeddingSender:
        """Waits until length and content of the embedding are known."""
        await _wait(lambda: room.sender is not None or self._gone(room), self._wait_seconds)
        if room.sender is not None:
            return room.sender
        if self._gone(room):
            raise _unknown(str(room.number))
        raise LeaseExpired(f"its media have not been decoded within {self._wait_seconds:g} s", room=room.number)

    def _gone(self, room: Room) -> bool:
        return self._service.room(room.number) is not room

    async def _sha256(self, bytes_of: _Bytes) -> bytes | None:
        """Of all bytes, if all are there."""
        if bytes_of.ready_tokens() < bytes_of.total_tokens:
            return None
        known = self._digests.get(bytes_of.of)
        if known is None:
            known = await asyncio.get_running_loop().run_in_executor(None, bytes_of.sha256)
            self._digests[bytes_of.of] = known
        return known


class _Bytes:
    """The embedding of a room as one string of bytes. It holds the arrays, so it outlives the room."""

    def __init__(self, room: Room, sender: EmbeddingSender, wait_seconds: float) -> None:
        self.of = room
        self.room = room.number
        self.layout = sender.manager.layout
        self.token_bytes = self.layout.token_bytes
        self.total_tokens = room.total_tokens
        self.length = self.total_tokens * self.token_bytes
        self._sender = sender
        self._wait_seconds = wait_seconds
        self._rows: Fields = {}
        self._ready = 0

    def ready_tokens(self) -> int:
        rows, ready = self.of.made
        if ready > self._ready:
            self._rows, self._ready = rows, ready
        return self._ready

    async def until(self, tokens: int) -> None:
        """Waits until ``tokens`` are there.

        :raises EmbeddingTransferError: they will not be, or not in time.
        """
        await _wait(lambda: self.ready_tokens() >= tokens or self._failed(), self._wait_seconds)
        if self.ready_tokens() >= tokens:
            return
        if self._failed():
            raise self._sender.failure_exception()
        why = f"the encoder has made no further token for {self._wait_seconds:g} s; ask again from here"
        raise LeaseExpired(why, room=self.room)

    def _failed(self) -> bool:
        return self._sender.poll() is KVPoll.Failed

    def read(self, start: int, stop: int) -> bytes:
        """From ``start`` on, at most to ``stop``: what is there of a chunk. At least one token must be."""
        first = start // self.token_bytes
        last = min(first + max(1, CHUNK_BYTES // self.token_bytes), self.ready_tokens())
        tokens = np.concatenate([self._rows[field.name][first:last] for field in self.layout.fields], axis=1)
        origin = first * self.token_bytes
        return tokens.reshape(-1)[start - origin : stop - origin].tobytes()

    def sha256(self) -> bytes:
        digest, at = hashlib.sha256(), 0
        while at < self.length:
            chunk = self.read(at, self.length)
            digest.update(chunk)
            at += len(chunk)
        return digest.digest()


async def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Until ``condition`` holds, or ``seconds`` are over."""
    until, pause = time.monotonic() + seconds, LOOK_SECONDS
    while not condition() and time.monotonic() < until:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LOOK_LIMIT_SECONDS)


def etag_of(room: Room) -> str:
    return f'"{room.digest.hex()}"'


def layout_field(layout: Layout) -> str:
    """The layout as a list of RFC 8941 §3.1: ``"fill_ids";dtype=int32;width=1;offset=128, ...``. Offsets are bytes."""
    return ", ".join(_members(layout))


def _members(layout: Layout) -> Iterator[str]:
    offset = 0
    for field in layout.fields:
        name = re.sub(r"[^ !#-\[\]-~]", "?", field.name)  # what a string of RFC 8941 §3.3.3 holds as it is
        yield f'"{name}";dtype={field.dtype};width={field.width};offset={offset}'
        offset += field.token_bytes


def _unknown(number: str) -> ServeError:
    why = "is not open at this worker: nobody has asked for it, or it has been delivered or aborted"
    return ServeError("not_found", f"room {number[:20]} {why}")


def _refused(method: str, status: int, room: int) -> ServeError:
    code, why = {
        405: ("method_not_allowed", f"{method} is not for embeddings; {', '.join(METHODS)} are"),
        412: ("invalid_request", f"the embedding of room {room} is another one than the condition names; see its ETag"),
        416: ("invalid_request", f"the range begins behind the last byte of room {room}; see Content-Range"),
    }[status]
    return ServeError(code, why, status=status)
