"""A leased transport: its side channel and the links to receivers. Subclasses add the engines."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, TypeVar

import msgspec

from embferry.protocol.errors import TransportError
from embferry.trust import Trust
from embferry.trust.greeting import Channel, Role

from ..contract import Region
from ..handles import Host, Port, Token, boot_id
from ..net import address
from ..net.connections import LinkedTransport
from ..net.listener import Listener, ListenLimits, listen
from ..net.stalls import check_stall_timeout
from .engine_thread import WriteEngine
from .messages import Hello
from .receiving_end import ReceivingEnd, SenderConnection
from .sending_end import SendingEnd

R = TypeVar("R", bound=ReceivingEnd)


class LeasedTransport(LinkedTransport[R, SendingEnd]):
    """A subclass makes the receiving end and its handle, and connects to handles.

    Args:
        host: The address the side channel listens on, at ``port``; ``advertise``: the one peers connect to, if another.
        connect_timeout_s: How long a receiver may take to answer a connection.
        stall_timeout_s: See :class:`SendingEnd`.
        limits: Of the side channel's connections; lowered to the senders that the engine can serve.
        trust: The keys that peers of the side channel must know, and whether strangers may be let in; None: what the
            environment says.
        engine_end_timeout_s: How long :meth:`close` waits for the engines of links; None: without limit.
    """

    channel: ClassVar[Channel]
    """The channel in the side channel's greeting."""
    acknowledged: ClassVar[bool] = False
    """See :class:`SendingEnd`."""

    def __init__(
        self,
        wake: Callable[[], None],
        host: str,
        port: int,
        advertise: str | None,
        connect_timeout_s: float,
        stall_timeout_s: float,
        limits: ListenLimits,
        trust: Trust | None,
        engine_end_timeout_s: float | None = None,
    ) -> None:
        self._trust = Trust.or_environment(trust)
        self._stall_timeout_s = check_stall_timeout(stall_timeout_s)
        super().__init__(wake)
        self._host, self._port, self._advertise, self._limits = host, port, advertise or host, limits
        self._connect_timeout_s, self._engine_end_timeout_s = connect_timeout_s, engine_end_timeout_s

    def register(self, region: Region) -> bytes:
        """Makes the region reachable, as in the contract.

        Raises:
            LocalProtocolError: A region is registered already, an address is invalid, strangers can reach it and there
                is no key, or the engine needs memory that can be mapped twice (``Capabilities.maps_region``).
            TransportError: The engine is not installed, cannot start or does not take the region, or the port is taken.
        """
        self._check_unregistered()
        advertise, own = address.advertised(self._advertise), address.own(self._host)
        self._trust.check_listening(str(own), f"the port of the {self.name} transport")
        sock = listen(self._host, self._port)
        try:
            receiving = self._receive(region)
        except BaseException:
            sock.close()
            raise
        receiving.listen(sock, self._limits, partial(self._trust.greeting, Role.ACCEPTOR, self.channel))
        self._receiving = receiving
        return msgspec.msgpack.encode(self._handle(receiving, advertise, receiving.listener.port, receiving.token))

    @abstractmethod
    def _receive(self, region: Region) -> R:
        """Makes the receiving end."""

    @abstractmethod
    def _handle(self, receiving: R, host: Host, port: Port, token: Token) -> msgspec.Struct:
        """Returns the handle of the receiving end, whose side channel is at ``host`` and ``port``."""

    def _link(self, handle: bytes, host: str, port: int, token: bytes, open_engine: Callable[[], WriteEngine]) -> None:
        """Makes the link behind ``handle``, unless there is one, to the side channel at ``host`` and ``port``.

        Raises:
            TransportError: No receiver can have that address, or the connection is refused at once.
        """
        make = partial(
            SendingEnd,
            (address.reachable(host), port),
            Hello(token, boot_id()),
            open_engine,
            self._loop,
            self._outbox,
            partial(self._over, handle),
            partial(self._trust.greeting, Role.DIALER, self.channel),
            transport=self.name,
            acknowledged=self.acknowledged,
            connect_timeout_s=self._connect_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
        )
        self._join(handle, make)

    def _listener(self) -> Listener[SenderConnection] | None:
        return None if self._receiving is None else self._receiving.listener

    def _shut(self, links: Sequence[SendingEnd]) -> None:
        limit = self._engine_end_timeout_s
        deadline = None if limit is None else time.monotonic() + limit
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)  # a loop that died of a bug has not done it
        for link in links:
            link.join(deadline)
        if self._receiving is not None:
            self._receiving.close()
