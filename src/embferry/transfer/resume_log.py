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
    _is_completed: bool = False

    def granted(self, machine: Receiver, start: int, tokens: int, blocks: int) -> None:
        """Blocks have been granted for ``tokens`` tokens from ``start`` on.

        That a resumed transfer is needed is told only now, when it follows: one that waits for blocks may also end.
        """
        if self.grants:
            level, extra = logging.DEBUG if self.grants > 1 else logging.INFO, {"room": machine.room}
            counts = machine.room, machine.transferred_tokens, machine.total_tokens
            log.log(
                level, "room %d: needs resume for remaining data: %d of %d tokens transferred", *counts, extra=extra
            )
            text = "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d, blocks %d"
            log.log(level, text, machine.room, start, tokens, blocks, extra=extra)
        self.grants += 1

    def completed(self, machine: Receiver) -> None:
        """The transfer has succeeded."""
        if self.grants > 1 and not self._is_completed:
            self._is_completed = True
            text = "room %d: completed with resumed transfer: %d tokens, 1 initial and %d resumed"
            counts = machine.total_tokens, self.grants - 1
            log.info(text, machine.room, *counts, extra={"room": machine.room})
