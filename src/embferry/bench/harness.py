"""Lets contestants take turns: round k of every one before round k+1 of any, in an order that is shuffled each time.

So whatever else the machine does falls on all alike. Who is not taking its turn is stopped (SIGSTOP)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from .child import CLOSE_S, ContestantError
from .contestants import Contestant, missing
from .contract import Job, UnavailableError
from .machine import available_bytes
from .pair import Pair
from .payloads import Payload
from .results import Measurement, Status

SEED = 20
COPIES = 3
"""An embedding lies in memory so often, at most: source, destination, and a pool or a frame."""
PROCESS_BYTES = 45 << 20
SHARE_OF_MEMORY = 0.75

Report = Callable[[str, int], None]
"""What is being done now, and how many rounds have been done since the last report."""


class Entry(msgspec.Struct, frozen=True):
    """A contestant with a payload, in a comparison or as a point of a sweep."""

    contestant: Contestant
    payload: Payload
    sweep: str = ""
    x: float = 0.0
    copies: float = COPIES
    """How many payloads of memory it takes."""

    @property
    def bytes_needed(self) -> int:
        return int(self.payload.size * self.copies) + 2 * PROCESS_BYTES

    def measurement(self) -> Measurement:
        c = self.contestant
        return Measurement(c.key, c.label, c.kind, self.payload, sweep=self.sweep, x=self.x, options=dict(c.options))


def measure(entries: Sequence[Entry], rounds: int, folder: str, timeout_s: float, report: Report) -> list[Measurement]:
    """``rounds`` rounds of each, after one to warm up. Who is missing or fails is in the result with the reason."""
    done: list[Measurement] = []
    for number, group in enumerate(_groups(entries)):
        measured = [(entry, entry.measurement()) for entry in group]
        for _, measurement in measured:
            measurement.group = number
        _measure_group(measured, rounds, folder, timeout_s, report)
        done += [measurement for _, measurement in measured]
    return done


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Parts of ``entries`` that fit into memory together."""
    budget = available_bytes() * SHARE_OF_MEMORY
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes_needed for e in group) + entry.bytes_needed > budget:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _measure_group(
    measured: list[tuple[Entry, Measurement]], rounds: int, folder: str, timeout_s: float, report: Report
) -> None:
    budget, running = available_bytes() * SHARE_OF_MEMORY, list[int]()
    pairs: dict[int, Pair] = {}
    with _ending(pairs):
        for index, (entry, measurement) in enumerate(measured):
            report(f"{entry.payload.name}: starting {measurement.label}", 0)
            if reason := missing(entry.contestant):
                _leave(measurement, "missing", reason, rounds + 1, report)
            elif entry.bytes_needed > budget:
                _leave(measurement, "skipped", f"needs {entry.bytes_needed / 1e9:.1f} GB", rounds + 1, report)
            else:
                pairs[index] = pair = Pair(_job(entry, folder, timeout_s))
                pair.begin()
                running.append(index)
        for index in list(running):
            report(f"{measured[index][0].payload.name}: connecting {measured[index][1].label}", 0)
            with _surviving(measured[index][1], pairs, index, running, rounds + 1, report):
                pairs[index].connect()
                pairs[index].park()
        shuffle = random.Random(SEED)
        for number in range(rounds + 1):
            order = list(running)
            shuffle.shuffle(order)
            for index in order:
                entry, measurement = measured[index]
                report(f"{entry.payload.name}: {measurement.label}", 1)
                with _surviving(measurement, pairs, index, running, rounds - number, report):
                    _turn(pairs[index], measurement, number, verify=number in (0, rounds))


def _turn(pair: Pair, measurement: Measurement, number: int, *, verify: bool) -> None:
    pair.resume()
    sample = pair.run(number, verify=verify)
    pair.park()
    measurement.verified_rounds += verify
    measurement.pool_bytes, measurement.memory_method = pair.pool_bytes, pair.memory_method
    if number > 0:  # the first round warms up
        measurement.samples.append(sample)


def _job(entry: Entry, folder: str, timeout_s: float) -> Job:
    contestant, payload = entry.contestant, entry.payload
    return Job(
        contestant.key.replace("/", "-"),
        contestant.factory,
        payload.tokens,
        payload.size,
        contestant.options,
        folder,
        timeout_s + payload.size / 50e6,
    )


@contextmanager
def _surviving(
    measurement: Measurement, pairs: dict[int, Pair], index: int, running: list[int], left: int, report: Report
) -> Iterator[None]:
    """A contestant that fails is out, with its reason; the others go on."""
    try:
        yield
    except (ContestantError, UnavailableError) as error:
        running.remove(index)
        pairs.pop(index).kill()
        _leave(measurement, "missing" if isinstance(error, UnavailableError) else "error", str(error), left, report)


def _leave(measurement: Measurement, status: Status, reason: str, rounds: int, report: Report) -> None:
    measurement.status, measurement.reason = status, reason
    report(f"{measurement.label}: {status}", rounds)


@contextmanager
def _ending(pairs: dict[int, Pair]) -> Iterator[None]:
    """Whatever happens, no process remains."""
    try:
        yield
    finally:
        deadline = time.monotonic() + CLOSE_S
        for pair in pairs.values():
            pair.ask_to_close()
        for pair in pairs.values():
            pair.end(max(0.0, deadline - time.monotonic()))
