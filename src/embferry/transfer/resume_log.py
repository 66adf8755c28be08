"""Log lines of transfers that take several grants. Users search their logs for these words."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from embferry.protocol.receiver import Receiver

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ResumeLog:
    """The lines of one transfer. The first of each kind is logged at INFO, later ones at DEBUG.

    Attributes:
        grants: Grants so far: one initial, every further one resumed.
    """

    grants: int = 0
    _needed: int = 0  # at which number of grants the need for another was last logged
    _is_completed: bool = False

    def needs(self, machine: Receiver) -> None:
        """Tokens remain that the grants so far do not cover."""
        if self._needed < self.grants:
            level = logging.DEBUG if self._needed else logging.INFO
            self._needed = self.grants
            counts = machine.transferred_tokens, machine.total_tokens
            log.log(
                level, "room %d: needs resume for remaining data: %d of %d tokens transferred", machine.room, *counts
            )

    def granted(self, machine: Receiver, start: int, tokens: int, blocks: int) -> None:
        """Blocks have been granted for ``tokens`` tokens from ``start`` on."""
        if self.grants:
            self.needs(machine)
            text = "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d, blocks %d"
            log.log(logging.DEBUG if self.grants > 1 else logging.INFO, text, machine.room, start, tokens, blocks)
        self.grants += 1

    def completed(self, machine: Receiver) -> None:
        """The transfer has succeeded."""
        if self.grants > 1 and not self._is_completed:
            self._is_completed = True
            text = "room %d: completed with resumed transfer: %d tokens, 1 initial and %d resumed"
            log.info(text, machine.room, machine.total_tokens, self.grants - 1)
