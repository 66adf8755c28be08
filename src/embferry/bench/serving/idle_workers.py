"""A plug-in for vLLM: a process that waits for another one's message sleeps after some milliseconds.

vLLM's engine and worker look for the next message without rest for a second after each one, and only then sleep. With
a core for each that costs nobody anything. With five engines on two cores they fill both, and a thread that has
something to do waits for hundreds of milliseconds until the kernel lets it run: what is measured then is the kernel.
"""

from __future__ import annotations

from typing import Any

SPIN_S = 0.003
LOOK_MS = 5
"""Who sleeps looks so often. vLLM's notices are dropped when two follow each other closely, which does no harm within
the second of looking without rest; without it, some requests waited for 5 s, vLLM's own limit."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if getattr(SpinCondition, "sleeps_early", False):
        return
    make, wait = SpinCondition.__init__, SpinCondition.wait

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  (it becomes one)
        make(self, *args, **kwargs)
        if self.is_reader:
            self.busy_loop_s = SPIN_S

    def look(self: Any, timeout_ms: int | None = None) -> None:
        wait(self, LOOK_MS if timeout_ms is None else min(timeout_ms, LOOK_MS))

    SpinCondition.__init__, SpinCondition.wait, SpinCondition.sleeps_early = __init__, look, True
