"""The retry policy of a receiver: when it repeats a request, and after how many setbacks it gives up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .settings import TransferSettings


@dataclass(slots=True)
class RetryPolicy:
    """Counts setbacks since the last good chunk and spaces repeated requests (exponential back-off, RFC 6298 §5.5).

    Attributes:
        retry_at: When unanswered requests are repeated.
        pause_until: Until then nothing is granted, after several bad chunks in a row; None: no pause.
        bad_chunks: Bad chunks of the whole transfer.
        bad_in_a_row: Bad chunks since the last good one.
        lost_in_a_row: Losses of the peer since the last good chunk.
    """

    settings: TransferSettings
    retry_at: float
    pause_until: float | None = None
    bad_chunks: int = 0
    bad_in_a_row: int = 0
    lost_in_a_row: int = 0
    _interval: float = field(init=False)
    _acknowledged_at: float = -math.inf

    def __post_init__(self) -> None:
        self._interval = min(self.settings.retry_interval, self.settings.longest_interval)

    def asked(self, now: float) -> None:
        """A new request was sent: its first repetition comes after the shortest interval."""
        self._interval = min(self.settings.retry_interval, self.settings.longest_interval)
        self.retry_at = now + self._interval

    def asked_again(self, now: float) -> None:
        """Requests were repeated: doubles the interval."""
        self._interval = min(2 * self._interval, self.settings.longest_interval)
        self.retry_at = now + self._interval

    def good(self) -> None:
        """A chunk was verified."""
        self.bad_in_a_row = self.lost_in_a_row = 0

    def bad_chunk(self, now: float) -> bool:
        """Counts a bad chunk; from the second in a row on, pauses, so that the fault can pass.

        Returns:
            Whether the transfer may go on.
        """
        self.bad_chunks += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row > 1:
            pause = self.settings.retry_interval * 2.0 ** (self.bad_in_a_row - 2)
            self.pause_until = now + min(pause, self.settings.retry_limit)
        return self.bad_in_a_row <= self.settings.max_bad_chunks

    def peer_lost(self) -> bool:
        """Counts a loss of the peer. Returns whether the transfer may go on."""
        self.lost_in_a_row += 1
        return self.lost_in_a_row <= self.settings.max_peer_losses

    def may_acknowledge(self, now: float) -> bool:
        """Returns whether the last acknowledgement is long enough ago, and if so counts this as the next one."""
        if now - self._acknowledged_at < 1 / self.settings.progress_rate:
            return False
        self._acknowledged_at = now
        return True

    def transport_changed(self) -> None:
        """Another transport is in use: bad chunks of the last one no longer count."""
        self.bad_in_a_row, self.pause_until = 0, None

    def peer_changed(self) -> None:
        """Another peer is in use: setbacks of the last one no longer count."""
        self.good()
        self.transport_changed()

    def is_paused(self, now: float) -> bool:
        return self.pause_until is not None and now < self.pause_until

    def advance(self, now: float) -> None:
        """Ends a pause that is over."""
        if self.pause_until is not None and now >= self.pause_until:
            self.pause_until = None
