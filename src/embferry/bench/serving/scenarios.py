"""The scenarios of the comparison, and what is damaged in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from . import corruption
from .configurations import SMALL, Configuration
from .results import Run
from .stack import Stack
from .workload import Picture, Plan, Request, requests

Damage = Literal["", "corrupted", "killed", "small pool"]
QUICK_REQUESTS = 6
KILL_AFTER = 1 / 3
"""The share of requests after which the encoder is killed."""
KILL_DELAY_S = 0.1
"""After a request was sent, so that its pictures are being encoded."""

TOO_LARGE, FITTING = Picture((5, 0), 896, 896, 1024), Picture((5, 1), 224, 168, 48)
"""Embeddings of 1 MiB, and of less than the small pool of 64 KiB."""


class Scenario(msgspec.Struct, frozen=True):
    name: str
    title: str
    plan: Plan | None
    """None for the two pictures above, one after the other."""
    damage: Damage = ""
    timeout_s: float = 90.0
    concurrency: int = 8
    max_tokens: int = 32

    def requests(self) -> list[Request]:
        if self.plan is None:
            return [Request(number, 0.0, (picture,)) for number, picture in enumerate((TOO_LARGE, FITTING))]
        return requests(self.plan)

    def shortened(self) -> Scenario:
        if self.plan is None:
            return self
        fewer = min(QUICK_REQUESTS, self.plan.requests)
        return msgspec.structs.replace(self, plan=msgspec.structs.replace(self.plan, requests=fewer))


_BURSTY = Plan(requests=24, rate=1.0, burstiness_cv=4.9, repeated=0.5, seed=2)
SCENARIOS = (
    Scenario("fits", "Everything fits", Plan(requests=24, rate=1.0, seed=1)),
    Scenario("bursty", "Bursty, half of the pictures repeated", _BURSTY),
    Scenario("corrupted", "Bytes corrupted on the way", Plan(requests=8, rate=1.0, seed=3), "corrupted"),
    Scenario("killed", "An encoder killed", Plan(requests=24, rate=2.0, seed=4), "killed"),
    Scenario("pool", "A pool smaller than the embedding", None, "small pool", timeout_s=180.0, concurrency=1),
)

_OUT_OF_REACH = "not done: the bytes are moved by an engine of another project"
_CORRUPTED = {"example": f"the last {corruption.TAIL:.0%} of a file zeroed", "embferry": "a bit flipped"}
"""How bytes are corrupted, by connector."""
NOTHING_TO_DAMAGE: dict[tuple[Damage, str], str] = {
    ("killed", "undivided"): "has no encoder of its own that could be killed",
    ("corrupted", "undivided"): "no embedding travels",
    ("corrupted", "vllm-mooncake"): _OUT_OF_REACH,
    ("corrupted", "ours-mooncake"): _OUT_OF_REACH,
    ("corrupted", "ours-nixl"): _OUT_OF_REACH,
    ("small pool", "example"): "has no pool: its embeddings are files",
}


def skipped(scenario: Scenario, configuration: Configuration) -> str:
    """Returns why the configuration does not take part; empty if it does."""
    return NOTHING_TO_DAMAGE.get((scenario.damage, configuration.name), "")


@contextmanager
def damaging(scenario: Scenario, stack: Stack, run: Run, count: int) -> Iterator[Callable[[int, float], None]]:
    """Prepares the servers for ``count`` requests, and yields what to call when one was sent.

    The run gets a note, and the time, when damage is done.

    Raises:
        StartError: the router does not start.
    """
    if scenario.damage == "small pool" and stack.divided:
        stack.route(SMALL, through=stack.encoders[-1:])  # for both requests; the other encoder may have been killed
    else:
        stack.route()
    threads: list[threading.Thread] = []

    def kill(at: float) -> None:
        time.sleep(KILL_DELAY_S)
        stack.encoders[0].kill()
        run.damaged_at = at + KILL_DELAY_S
        run.notes.append(f"at {run.damaged_at:.1f} s one of two encoders was killed (SIGKILL) and not started again")

    def began(number: int, at: float) -> None:
        if scenario.damage == "killed" and number == round(count * KILL_AFTER):
            threads.append(threading.Thread(target=kill, args=(at,)))
            threads[-1].start()

    if scenario.damage == "corrupted":
        stack.damage.touch()
    try:
        yield began
    finally:
        for thread in threads:
            thread.join()
        if scenario.damage == "corrupted":
            times = stack.damage.stat().st_size
            run.notes.append(f"{run.title}: {_CORRUPTED[stack.configuration.connector]}, {times} times")
            stack.damage.unlink()
