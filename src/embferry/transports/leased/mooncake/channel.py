"""The side channel: small messages between a sender and a receiver, on a TCP connection beside the engine's own.

The engine writes one-sidedly: its receiver neither decides nor learns anything. So a sender asks before each write
(:class:`Enter`) and says when it is over (:class:`Leave`); see :mod:`access`. A frame is its length, uint32
little-endian, and that many bytes of MessagePack.

==========  ========  ================================================================
sender      receiver  meaning
==========  ========  ================================================================
``Hello``             the token of the handle; first
``Enter``             may I write these blocks under this epoch?
..          ``Entered``   yes, from this address on; or no
``Leave``             my engine has ended this write
..          ``Left``      I know, and whether its window is still open
..          ``Stop``      begin nothing more of what has entered under this epoch
==========  ========  ================================================================
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from ...handles import Token
from ...net.loop import READ, WRITE, Loop

BLOCK_BYTES = 4

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    token: Token


class Enter(msgspec.Struct, frozen=True, array_like=True, tag=2):
    key: int
    """The sender's number for the write; new for every write of the connection."""
    epoch: int
    blocks: bytes
    """The blocks it touches, ascending, uint32 little-endian each."""


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=3):
    key: int
    clean: bool
    """Every part that was begun has been applied; if not, bytes of it may be on their way."""


class Entered(msgspec.Struct, frozen=True, array_like=True, tag=4):
    key: int
    address: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)] | None
    """Where the region begins in the receiver's process, for the engine; None: refused."""


class Left(msgspec.Struct, frozen=True, array_like=True, tag=5):
    key: int
    allowed: bool


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=6):
    epoch: int


FromSender = Hello | Enter | Leave
FromReceiver = Entered | Left | Stop


class ChannelError(Exception):
    """The peer broke the format; the connection is of no more use."""


class Channel:
    """One end of a side channel. Everything here is for the loop's thread.

    :param kind: the messages that may arrive, a union.
    :param limit: bytes of the longest of them.
    :param max_unsent: bytes the peer may leave unread before it is given up.
    :param on_message: gets each; may raise :class:`ChannelError`.
    :param on_end: called once with the reason, when the peer ended it or broke it.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Loop,
        kind: Any,
        limit: int,
        max_unsent: int,
        on_message: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._sock, self._loop, self._limit, self._max_unsent = sock, loop, limit, max_unsent
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message, self._on_end = on_message, on_end
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._open = False
        self._closed = False

    def open(self) -> None:
        """The socket is connected: sends what has waited, and listens."""
        self._open = True
        self._turn(WRITE)

    def send(self, message: msgspec.Struct) -> None:
        if self._closed:
            return
        body = self._encoder.encode(message)
        self._outgoing += _LENGTH.pack(len(body)) + body
        if self._open:
            self._turn(WRITE)

    def close(self) -> None:
        """Ends it from this side. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()

    def _turn(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ:
                self._receive()
        except (ChannelError, OSError) as error:
            self._break(str(error))
            return
        if not self._closed:
            self._loop.watch(self._sock.fileno(), READ | WRITE if self._outgoing else READ, self._turn)

    def _break(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_end(reason)

    def _flush(self) -> None:
        if self._outgoing:
            with contextlib.suppress(BlockingIOError):
                del self._outgoing[: self._sock.send(self._outgoing)]
        if len(self._outgoing) > self._max_unsent:
            raise ChannelError("it does not read what it is sent")

    def _receive(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise ChannelError("it closed the connection")
        self._incoming += data
        while not self._closed and len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > self._limit:
                raise ChannelError(f"a message of {length} bytes; {self._limit} are allowed")
            end = _LENGTH.size + length
            if len(self._incoming) < end:
                return
            body = bytes(self._incoming[_LENGTH.size : end])
            del self._incoming[:end]
            try:
                message = self._decoder.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ChannelError(f"a malformed message: {error}") from error
            self._on_message(message)
