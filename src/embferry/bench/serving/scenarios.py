"""What the configurations are put through: as a table, and what is broken meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import msgspec

from .configurations import Configuration
from .corruption import FlippedBits, ZeroedTails
from .driver import Watch
from .gate import Gate
from .results import Event, Run, Sample
from .stack import Stack
from .workload import Picture, Plan, Request, requests

Broken = Literal["", "killed", "corrupted", "small pool"]
QUICK_REQUESTS = 6
KILL_AFTER = 1 / 3
"""Share of requests that were sent when the encoder is killed."""
KILL_DELAY_S = 0.1
"""After the request was sent, so that its pictures are being encoded."""

TOO_LARGE, FITTING = Picture((5, 0), 896, 896, 1024), Picture((5, 1), 224, 168, 48)
"""1 MiB, and less than the small pool of 64 KiB."""


class Scenario(msgspec.Struct, frozen=True):
    name: str
    title: str
    plan: Plan | None
    """None: the two pictures above, one after the other."""
    broken: Broken = ""
    timeout_s: float = 90.0
    concurrency: int = 8
    max_tokens: int = 32

    def requests(self, quick: bool) -> list[Request]:
        if self.plan is None:
            return [Request(number, 0.0, (picture,)) for number, picture in enumerate((TOO_LARGE, FITTING))]
        return requests(self.planned(quick) or self.plan)

    def planned(self, quick: bool) -> Plan | None:
        if self.plan is None or not quick:
            return self.plan
        return msgspec.structs.replace(self.plan, requests=min(QUICK_REQUESTS, self.plan.requests))


SCENARIOS = (
    Scenario("fits", "Everything fits", Plan(requests=24, rate=1.0, seed=1)),
    Scenario(
        "bursty",
        "Everything fits, bursty, half of the pictures were sent before",
        Plan(requests=24, rate=1.0, burstiness_cv=4.9, repeated=0.5, seed=2),
    ),
    Scenario("corrupted", "Bytes corrupted on the way", Plan(requests=8, rate=1.0, seed=3), "corrupted"),
    Scenario("killed", "An encoder killed in the middle", Plan(requests=24, rate=2.0, seed=4), "killed"),
    Scenario(
        "pool",
        "A receive pool of 64 KiB: an embedding of 1 MiB, then one of 48 KiB",
        None,
        "small pool",
        timeout_s=180.0,
        concurrency=1,
    ),
)

NOTHING_TO_BREAK: dict[tuple[Broken, str], str] = {
    ("killed", "undivided"): "has no encoder of its own that could be killed",
    ("corrupted", "undivided"): "no embedding travels",
    ("corrupted", "vllm-mooncake"): "not done: its engines agree on their data ports in a handshake of their own",
    ("corrupted", "ours-mooncake"): "not done: its engines agree on their data ports in a handshake of their own",
    ("corrupted", "ours-shm"): "not done: there is nothing between the two processes but memory that they share",
    ("corrupted", "ours-nixl"): "not done: the kernel copies from one process to the other",
    ("small pool", "example"): "has no pool: its embeddings are files",
}


def skipped(scenario: Scenario, configuration: Configuration) -> str:
    """Why the configuration does not take part; empty: it does."""
    return NOTHING_TO_BREAK.get((scenario.broken, configuration.name), "")


class Breaking(msgspec.Struct):
    """Something that is broken during a run."""

    watch: Watch
    events: list[Event]
    note: Callable[[], str]
    """Once the run is over."""


@contextmanager
def breaking(scenario: Scenario, stack: Stack, requests: int, ended: Callable[[Sample], None]) -> Iterator[Breaking]:
    """The servers as the scenario has them.

    :raises StartError: the router does not come up."""
    if scenario.broken == "killed":
        with _killing(stack, round(requests * KILL_AFTER), ended) as made:
            yield made
    elif scenario.broken == "corrupted":
        with _corrupting(stack, ended) as made:
            yield made
    else:
        small = scenario.broken == "small pool"
        # Both of its requests are encoded by the same one, whichever of the others are still there.
        stack.route(small=small, through=[encoder.url for encoder in stack.encoders[-1:]] if small else None)
        yield Breaking(Watch(ended=ended), [], str)


@contextmanager
def _killing(stack: Stack, at_request: int, ended: Callable[[Sample], None]) -> Iterator[Breaking]:
    stack.route()
    events: list[Event] = []
    victim = stack.encoders[0]

    def kill(at: float) -> None:
        time.sleep(KILL_DELAY_S)
        victim.kill()
        events.append(Event(at + KILL_DELAY_S, "one of two encoders was killed (SIGKILL) and stayed away"))

    threads: list[threading.Thread] = []

    def began(number: int, at: float) -> None:
        if number == at_request:
            threads.append(threading.Thread(target=kill, args=(at,)))
            threads[-1].start()

    yield Breaking(Watch(began, ended), events, str)
    for thread in threads:
        thread.join()


@contextmanager
def _corrupting(stack: Stack, ended: Callable[[Sample], None]) -> Iterator[Breaking]:
    with ExitStack() as open_ones:
        how: ZeroedTails | FlippedBits
        if stack.configuration.connector == "example":
            how, what = (
                open_ones.enter_context(ZeroedTails(stack.store)),
                "files had their last quarter zeroed: one in 1.5 MB of embeddings",
            )
        else:
            how, what = open_ones.enter_context(FlippedBits()), "bits were flipped in the stream: one in 1.5 MB"
        gates = [open_ones.enter_context(Gate(encoder.url, how.change)) for encoder in stack.encoders]
        stack.route(through=[gate.url for gate in gates])
        yield Breaking(Watch(ended=ended), [], lambda: f"{how.done} {what}")


def empty(scenario: Scenario, configuration: Configuration) -> Run:
    return Run(name=configuration.name, title=configuration.title, scenario=scenario.title)
