"""A plug-in for vLLM: a process that waits for another one's message sleeps after some milliseconds.

vLLM's engine and worker look for the next message without rest for a second after each one, and only then sleep. With
a core for each that costs nobody anything. With five engines on two cores they fill both, and a thread that has
something to do waits for hundreds of milliseconds until the kernel lets it run: what is measured then is the kernel.
"""

from __future__ import annotations

import time
from typing import Any

SPIN_S = 0.003
STARTED_S = 10.0
"""After so long both ends surely know each other; before, who sleeps might not be woken."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if getattr(SpinCondition, "sleeps_early", False):
        return
    original = SpinCondition.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  (it becomes one)
        original(self, *args, **kwargs)
        self.made_at = time.monotonic()

    def record_read(self: Any) -> None:
        self.last_read = time.monotonic()
        if self.last_read - self.made_at > STARTED_S:
            self.busy_loop_s = SPIN_S

    SpinCondition.__init__, SpinCondition.record_read = __init__, record_read
    SpinCondition.sleeps_early = True
