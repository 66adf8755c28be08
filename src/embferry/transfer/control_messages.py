"""Control messages of a manager: any thread queues them, the driver thread exchanges them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial

from embferry.protocol.errors import shown
from embferry.protocol.messages import VERSION, Body, Frame, encode

from .control.contract import ControlPlane
from .failures import attempt

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
"""A fault that a peer can cause is logged once in this time at most."""


class ControlMessages:
    """The messages of one manager, and its control plane, whose exceptions are caught.

    Args:
        control: The control plane.
        now: Returns the time, in seconds.

    Attributes:
        rejected: Messages that could not be read or sent.
    """

    def __init__(self, control: ControlPlane, now: Callable[[], float]) -> None:
        self.rejected = 0
        self._control, self._now = control, now
        self._outgoing: deque[Callable[[], None]] = deque()
        self._reported_at = -REPORT_SECONDS

    def queue(self, peer: Hashable, source: int, target: int, body: Body) -> None:
        """Queues a message. Any thread. One that is lost is repeated by the machine that needs an answer."""
        self._outgoing.append(partial(self._control.send, peer, encode(Frame(VERSION, source, target, body))))

    def forget(self, peer: Hashable) -> None:
        """No transfer needs a peer any more, unless another message to it is queued from now on. Any thread."""
        self._outgoing.append(partial(self._control.forget, peer))

    @property
    def is_queued(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._outgoing)

    # Driver thread

    def send(self) -> None:
        """Sends what is queued."""
        if self._outgoing:
            while self._outgoing:
                self.call(self._outgoing.popleft())
            self.call(self._control.flush)

    def call(self, call: Callable[[], None]) -> None:
        """Calls the control plane. If it raises, messages are lost at worst."""
        if (error := attempt(call)) is not None:
            self.report("the control plane failed: %s", shown(error))

    def report(self, text: str, *values: object) -> None:
        """Counts and logs a message that cannot be used, which a peer can cause as often as it likes."""
        self.rejected += 1
        if self._now() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = self._now()
            log.warning(text + " (%d such messages so far)", *values, self.rejected)
