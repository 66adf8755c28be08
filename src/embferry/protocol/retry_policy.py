"""How often a receiver repeats itself, and how much goes wrong before it gives up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .settings import TransferSettings


@dataclass(slots=True)
class RetryPolicy:
    """Counts setbacks since the last good token, and spaces the questions (exponential back-off, RFC 6298 §5.5)."""

    settings: TransferSettings
    retry_at: float
    pause_until: float | None = None
    bad_chunks: int = 0
    bad_in_a_row: int = 0
    lost_in_a_row: int = 0
    _interval: float = field(init=False)
    _acknowledged_at: float = -math.inf

    def __post_init__(self) -> None:
        self._interval = self.settings.retry_interval

    def asked(self, now: float) -> None:
        """Something new was asked: repeat it soon."""
        self._interval = self.settings.retry_interval
        self.retry_at = now + self._interval

    def asked_again(self, now: float) -> None:
        self._interval = min(2 * self._interval, self.settings.retry_limit)
        self.retry_at = now + self._interval

    def good(self) -> None:
        """A token has arrived."""
        self.bad_in_a_row = self.lost_in_a_row = 0

    def bad(self, now: float) -> bool:
        """A chunk was bad. Once is chance; more often, what is broken gets time to mend. False: it was too often."""
        self.bad_chunks += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row > 1:
            pause = self.settings.retry_interval * 2.0 ** (self.bad_in_a_row - 2)
            self.pause_until = now + min(pause, self.settings.retry_limit)
        return self.bad_in_a_row <= self.settings.max_bad_chunks

    def lost(self) -> bool:
        """The peer was lost. False: it was too often."""
        self.lost_in_a_row += 1
        return self.lost_in_a_row <= self.settings.max_peer_losses

    def may_acknowledge(self, now: float) -> bool:
        """Whether the last acknowledgement was long enough ago; if so, this is the next one."""
        if now - self._acknowledged_at < 1 / self.settings.progress_rate:
            return False
        self._acknowledged_at = now
        return True

    def transport_changed(self) -> None:
        """What was bad so far was the fault of a transport that is not used any more."""
        self.bad_in_a_row, self.pause_until = 0, None

    def peer_changed(self) -> None:
        """What went wrong so far was the last peer's fault."""
        self.good()
        self.transport_changed()

    def pauses(self, now: float) -> bool:
        return self.pause_until is not None and now < self.pause_until

    def passed(self, now: float) -> None:
        """Time has passed."""
        if self.pause_until is not None and now >= self.pause_until:
            self.pause_until = None
