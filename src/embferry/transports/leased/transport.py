"""The two ends of a leased transport put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from embferry.protocol.errors import TransportError

from ..net import address
from ..net.connections import LinkedTransport
from .engine_thread import WriteEngine
from .messages import Hello
from .receiving_end import ReceivingEnd, boot_id
from .sending_end import LinkSettings, SendingEnd

R = TypeVar("R", bound=ReceivingEnd)


class LeasedTransport(LinkedTransport[R, SendingEnd]):
    """A subclass makes the receiving end, and decodes handles."""

    _engine_end_timeout_s: float = float("inf")
    """How long :meth:`close` waits for the engines of links, seconds."""

    def _link(
        self,
        handle: bytes,
        peer: tuple[str, int],
        token: bytes,
        settings: LinkSettings,
        open_engine: Callable[[], WriteEngine],
    ) -> None:
        """Makes the link behind ``handle``, unless there is one, to the side channel at ``peer``: IP address and port.

        Raises:
            TransportError: No receiver can have that address, or the connection is refused at once.
        """
        to = address.reachable(peer[0]), peer[1]
        make = partial(SendingEnd, handle, to, Hello(token, boot_id()), settings, open_engine)
        self._join(handle, lambda: make(self._loop, self._outbox, self._forget))

    def _shut(self, links: Sequence[SendingEnd]) -> None:
        deadline = time.monotonic() + self._engine_end_timeout_s
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)  # a loop that died of a bug has not done it
        for link in links:
            link.join(deadline)
        if self._receiving is not None:
            self._receiving.close()
