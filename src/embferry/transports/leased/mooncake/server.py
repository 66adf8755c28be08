"""The receiving side of the side channel: senders that enter and leave."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
from functools import partial

import numpy as np

from ...contract import Region, Window
from ...net.listener import Listener
from ...net.loop import Loop
from ...outbox import Outbox
from .access import Access, Stay
from .channel import BLOCK_BYTES, Channel, ChannelError, Enter, Entered, FromSender, Hello, Leave, Left, Stop
from .engine import Engine

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_CONNECTIONS = 1024
MAX_UNSENT = 4 << 20  # bytes of answers a sender may leave unread
MAX_INSIDE = 256  # writes of one sender at a time; ours keep below it


class Server:
    """Everything that serves the senders of one region.

    :param grace_s: how long a revocation waits for the writers inside before it cuts them off.
    """

    def __init__(
        self,
        region: Region,
        engine: Engine,
        token: bytes,
        sock: socket.socket,
        grace_s: float,
        loop: Loop,
        outbox: Outbox,
    ) -> None:
        self.token, self.loop = token, loop
        self.max_message = 64 + region.num_blocks * BLOCK_BYTES
        self._grace_s = grace_s
        self.access = Access(region, engine, outbox, self._stop, self._later)
        self.listener = Listener(sock, loop, "a sender", MAX_CONNECTIONS, partial(Sender, self))
        self.listener.start()

    def admit(self, window: Window) -> None:
        self.access.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self.access.close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self.access.revoke(epoch)

    def close(self) -> None:
        """From another thread: cuts the region off, ends the engine, and tells the senders."""
        self.access.close()
        self.loop.call(self._end)

    def _stop(self, sender: object, epoch: int) -> None:
        assert isinstance(sender, Sender)
        self.loop.call(partial(sender.stop, epoch))

    def _later(self, epoch: int) -> None:
        self.loop.call(lambda: self.loop.later(self._grace_s, partial(self.access.expire, epoch)))

    # On the loop's thread

    def _end(self) -> None:
        self.listener.stop()
        for sender in list(self.listener.connections):
            sender.end("the receiver is closed", logging.DEBUG)


class Sender:
    """One sender, as the receiver knows it. Everything here is for the loop's thread."""

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        self._server, self._address = server, address
        self._greeted = False
        self._ended = False
        self._stays: dict[int, Stay] = {}
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # it may have gone already; reading will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel = Channel(
            sock, server.loop, FromSender, server.max_message, MAX_UNSENT, self._on_message, self.end
        )
        self._channel.open()
        server.loop.later(HANDSHAKE_S, self._check_greeting)

    def stop(self, epoch: int) -> None:
        self._channel.send(Stop(epoch))

    def end(self, reason: str, level: int = logging.INFO) -> None:
        if self._ended:
            return
        self._ended = True
        log.log(level, "the connection of the sender at %s is over: %s", self._address, reason)
        self._channel.close()
        self._server.listener.connections.discard(self)
        for stay in self._stays.values():
            self._server.access.leave(stay, clean=False)
        self._stays.clear()

    def _check_greeting(self) -> None:
        if not self._greeted:
            self.end(f"it did not introduce itself within {HANDSHAKE_S} s", logging.WARNING)

    def _on_message(self, message: FromSender) -> None:
        if isinstance(message, Hello):
            if not hmac.compare_digest(message.token, self._server.token):
                raise ChannelError("wrong token: it does not come from this receiver's handle")
            self._greeted = True
        elif not self._greeted:
            raise ChannelError("it did not introduce itself first")
        elif isinstance(message, Enter):
            self._enter(message)
        else:
            self._leave(message)

    def _enter(self, message: Enter) -> None:
        if message.key in self._stays or len(self._stays) >= MAX_INSIDE:
            raise ChannelError(f"write {message.key} began twice, or more than {MAX_INSIDE} at a time")
        if len(message.blocks) % BLOCK_BYTES:
            raise ChannelError("a torn list of blocks")
        blocks = np.frombuffer(message.blocks, "<u4").astype(np.intp)
        if blocks.size and blocks.max() >= self._server.access.rows.num_blocks:
            raise ChannelError(f"block {blocks.max()} does not exist")
        entered = self._server.access.enter(self, message.epoch, blocks)
        if entered is None:
            self._channel.send(Entered(message.key, None))
            return
        self._stays[message.key], address = entered
        self._channel.send(Entered(message.key, address))

    def _leave(self, message: Leave) -> None:
        stay = self._stays.pop(message.key, None)
        if stay is None:
            raise ChannelError(f"write {message.key} ended without having begun")
        self._channel.send(Left(message.key, self._server.access.leave(stay, clean=message.clean)))
