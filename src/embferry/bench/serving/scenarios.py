"""A scenario of the comparison, and what is damaged in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from .configurations import Damage
from .faults import FAULTS, REUSED_ID, Sent, number_of_victim
from .results import Run
from .stack import Stack
from .workload import Picture, Plan, Request, requests

QUICK_REQUESTS = 6
TURN = 1000
"""Between the seeds of pictures in one round and the next; scenarios have smaller seeds."""
END_S = 10.0
"""How long a server that has failed may take to end."""
FITTING = Picture((5, 1), 224, 168, 48)
"""An embedding of less than the small pool of 64 KiB."""


class Scenario(msgspec.Struct, frozen=True):
    name: str
    title: str
    plan: Plan | None
    """None for the pictures, one after the other."""
    damage: Damage = ""
    timeout_s: float = 90.0
    concurrency: int = 8
    max_tokens: int = 32
    pictures: tuple[Picture, ...] = ()

    def requests(self, turn: int = 0) -> list[Request]:
        """Returns the requests of a round.

        Rounds differ in what is drawn: times, sizes and numbers of pictures, because it is chance which requests meet.
        Pictures that are given differ in their pixels.
        """
        if self.plan is None:
            keys = [(each.key[0] + TURN * turn, each.key[1]) for each in self.pictures]
            seen = [msgspec.structs.replace(each, key=key) for each, key in zip(self.pictures, keys, strict=True)]
            made = [Request(n, 0.0, (each,), int(each in seen[:n])) for n, each in enumerate(seen)]
        else:
            made = requests(msgspec.structs.replace(self.plan, seed=self.plan.seed + TURN * turn))
        if self.damage == "id used again":
            victim = number_of_victim(len(made))
            made[victim] = msgspec.structs.replace(made[victim], rid=REUSED_ID)
        return made

    def shortened(self) -> Scenario:
        if self.plan is None:
            return self
        fewer = min(QUICK_REQUESTS, self.plan.requests)
        return msgspec.structs.replace(self, plan=msgspec.structs.replace(self.plan, requests=fewer))


@contextmanager
def damaging(scenario: Scenario, stack: Stack, run: Run, count: int) -> Iterator[Sent]:
    """Prepares the servers for ``count`` requests, and yields what to call when one was sent.

    The run gets a note, and the time, when damage is done, and a note about each server that ended by itself.

    Raises:
        StartError: a server does not start.
    """
    stack.prepare(scenario.damage)
    alive = [server for server in stack.servers.values() if server.alive]
    try:
        with FAULTS[scenario.damage](stack, run, count) as sent:
            yield sent
    finally:
        deadline = time.monotonic() + (END_S if any(sample.error for sample in run.samples) else 0)
        while all(server.alive for server in alive if server.wanted) and time.monotonic() < deadline:
            time.sleep(0.1)  # a server that fails may take a moment to end
        for server in alive:
            if server.wanted and not server.alive:
                run.notes.append(f"{run.title}: {server.name} ended, with every request in it")
