"""The receiving side: one listener, a connection for each sender, and the lease table that decides their asks."""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

from embferry.trust.greeting import Greeting

from ..contract import Region, Revoked, Window
from ..handles import TOKEN_BYTES, boot_id
from ..net.connector import set_keepalive
from ..net.listener import Listener, ListenLimits
from ..net.loop import Scope
from ..outbox import Outbox
from . import messages as m
from .channel import Channel
from .leases import Lease, LeaseTable, Outcome
from .messages import FrameError

log = logging.getLogger(__name__)

MAX_UNSENT = m.MAX_FRAME + (256 << 10)  # bytes of answers that a sender may leave unread


class ReceivingEnd(ABC):
    """Everything that receives into one region, from :meth:`listen` on.

    A subclass makes the engine ready for a sender (:meth:`attach`) and cuts it off again (:meth:`detach`).

    Args:
        base, cut_off: See :class:`LeaseTable`. Senders of an engine that can be cut off are told that their "done" has
            arrived, and report a write only then.
        grace_s: How long a revocation waits for the holders of leases before they are cut off; None: without limit.
    """

    max_senders: ClassVar[int]
    descriptors_of_a_sender: ClassVar[int] = 1
    listener: Listener[SenderConnection]

    def __init__(
        self,
        region: Region,
        base: int,
        loop: Scope,
        outbox: Outbox,
        cut_off: Callable[[], int] | None = None,
        grace_s: float | None = None,
    ) -> None:
        self.table = LeaseTable(region, base, cut_off)
        self.loop, self.outbox, self._acknowledges, self._grace_s = loop, outbox, cut_off is not None, grace_s
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.boot_id = boot_id()

    def listen(self, sock: socket.socket, limits: ListenLimits, greet: Callable[[], Greeting]) -> None:
        """Begins to accept senders on ``sock``, which is closed with the rest. ``greet`` makes their greetings."""
        limits = replace(
            limits,
            connections=min(limits.connections, self.max_senders),
            connections_per_address=min(limits.connections_per_address, self.max_senders),
            descriptors_each=self.descriptors_of_a_sender,
        )
        # On one host the connection must end by the sender's own hand or its death: see nixl/receiving_end.py.
        make = partial(SenderConnection, self)
        self.listener = Listener(sock, self.loop, "a sender", limits, make, keepalive=False, greet=greet)
        self.listener.start()

    @abstractmethod
    def attach(self, sender: SenderConnection) -> None:
        """Makes the engine ready for a sender that has shown the token, then calls its ``welcome``.

        Runs on the loop's thread and must not block.
        """

    @abstractmethod
    def detach(self, sender: SenderConnection) -> None:
        """Ends what :meth:`attach` began. The sender's leases are in doubt; the connection is to be closed here.

        Runs on the loop's thread and must not block; called once for each sender, also for one never attached.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends all access to the region. From another thread than the loop's; may wait."""

    def admit(self, window: Window) -> None:
        self.table.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._carry_out_soon(self.table.close_blocks(epoch, blocks))

    def revoke(self, epoch: int) -> None:
        outcome = self.table.revoke(epoch)
        self._carry_out_soon(outcome)
        if epoch not in outcome.revoked and self._grace_s is not None:
            self.loop.call(partial(self.loop.later, self._grace_s, partial(self._expire, epoch)))

    def carry_out(self, outcome: Outcome) -> None:
        """Sends the messages of an outcome and posts its revocations.

        Runs on the loop's thread, before anything else does: "go" must precede "stop".
        """
        for lease, go in outcome.verdicts:
            _tell(lease, SenderConnection.send_verdict, lease, go)
        for lease in outcome.stops:
            _tell(lease, SenderConnection.send, m.Stop(lease.serial))
        if self._acknowledges:
            for lease, window_open in outcome.acknowledged:
                _tell(lease, SenderConnection.send, m.Acknowledged(lease.serial, window_open))
        for epoch in outcome.revoked:
            self.outbox.post(Revoked(epoch))

    def _carry_out_soon(self, outcome: Outcome) -> None:
        """Has the loop carry out an outcome, from any other thread. Completed revocations are posted at once."""
        for epoch in outcome.revoked:
            self.outbox.post(Revoked(epoch))
        if outcome.verdicts or outcome.stops:
            self.loop.call(partial(self.carry_out, Outcome(outcome.verdicts, outcome.stops)))

    # On the loop's thread

    def _expire(self, epoch: int) -> None:
        self.carry_out(self.table.expire(epoch))

    def _stop(self) -> None:
        self.listener.stop()
        for sender in self.listener.connections:
            sender.scope.run(sender.tear_down, "the receiver is closed", logging.DEBUG)


def _tell(lease: Lease, call: Callable[..., None], *arguments: object) -> None:
    """Calls a method of the holder's connection. What it raises is the failure of that connection."""
    assert isinstance(lease.holder, SenderConnection)
    lease.holder.scope.run(call, lease.holder, *arguments)


class SenderConnection:
    """The connection of one sender: the holder of its leases. Everything here is for the loop's thread."""

    def __init__(self, receiving: ReceivingEnd, sock: socket.socket, address: tuple[str, int]) -> None:
        self._receiving, self._address = receiving, address
        self.scope = receiving.loop.scope(self._failed)
        self.same_host = False
        self.ending = self._has_failed = False
        self._greeted = False
        self._base: int | None = None  # address of the region that the sender has been told
        self.channel = Channel(
            sock,
            self.scope,
            on_message=self._on_message,
            on_fault=self._on_fault,
            on_end=partial(self.tear_down, level=logging.DEBUG),
            limit=m.MAX_HELLO_FRAME,
            max_unsent=MAX_UNSENT,
        )

    def welcome(self, metadata: bytes) -> None:
        """Tells the sender that it may ask, and what its engine needs to reach ours."""
        self._base = self._receiving.table.base
        self.channel.send(m.Welcome(metadata, self._base))

    def send(self, message: m.Message) -> None:
        self.channel.send(message)

    def send_verdict(self, lease: Lease, go: bool) -> None:
        if go and lease.base != self._base:
            self._base = lease.base
            self.channel.send(m.Welcome(b"", lease.base))
        self.channel.send(m.Verdict(lease.serial, go))

    def tear_down(self, reason: str, level: int = logging.INFO) -> None:
        """Ends the connection and cuts the sender off."""
        if self.ending:
            return
        self.ending = True
        log.log(level, "closing the connection of the sender at %s: %s", self._address, reason)
        try:
            self._receiving.carry_out(self._receiving.table.lost(self))
        finally:
            self._receiving.detach(self)

    def close(self) -> None:
        self.channel.close()
        self._receiving.listener.ended(self)

    def make_room(self, reason: str) -> bool:
        """Ends the connection of a sender that does not write. One that writes must end it itself."""
        if self._receiving.table.holds_any(self):
            return False
        self.tear_down(reason)
        return True

    def _failed(self, error: BaseException) -> None:
        """A callback has raised. Writes of the sender may go on, so that it must be the one to end the connection."""
        if self.ending or self._has_failed:
            self._receiving.outbox.fail(error)  # its leases cannot be ended any more
            return
        self._has_failed = True
        self.scope = self._receiving.loop.scope(self._failed)
        self.channel.go_on(self.scope)

    def _on_fault(self, error: FrameError) -> None:
        log.warning("the sender at %s broke the format: %s", self._address, error)
        if self._greeted:
            self.channel.hang_up()  # its writes may go on until it notices, so it must be the one to end the connection
        else:
            self.tear_down("it did not introduce itself", logging.DEBUG)

    def _on_message(self, message: m.Message) -> None:
        table = self._receiving.table
        self._receiving.listener.served(self)
        match message:
            case _ if self.ending:
                return
            case m.Ping() if self._base is not None:
                self.channel.send(m.Pong())
                return
            case m.Hello(token, boot_id) if not self._greeted:
                self._on_hello(token, boot_id)
                return
            case m.Ask(serial, epoch, ranges) if self._base is not None:
                outcome = table.ask(self, serial, epoch, m.unpack_ranges(ranges))
            case m.Done(serial) | m.Failed(serial) if self._base is not None:
                outcome = table.done(self, serial, clean=isinstance(message, m.Done))
            case m.Broken() if self._base is not None:
                self.tear_down("its engine failed")
                return
            case _:
                raise FrameError(f"a sender does not send {type(message).__name__} here")
        if outcome is None:
            kind = type(message).__name__
            raise FrameError(f"{kind} of the write {serial}: begun twice, never begun, or one too many")
        self._receiving.carry_out(outcome)

    def _on_hello(self, token: bytes, boot_id: str) -> None:
        if not hmac.compare_digest(token, self._receiving.token):
            raise FrameError("wrong token: it does not come from this receiver's handle")
        self._greeted = True
        self.same_host = boot_id == self._receiving.boot_id
        if not self.same_host:
            set_keepalive(self.channel.sock)
        self.channel.limit = m.MAX_FRAME
        self._receiving.listener.opened(self)
        self._receiving.listener.served(self)  # the token is known to those that a transfer has invited
        if not self.ending:
            self._receiving.attach(self)
