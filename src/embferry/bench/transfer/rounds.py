"""Candidates take turns: round k of all of them comes before round k+1 of any, in a shuffled order.

So other work of the machine affects all alike. A candidate that is not taking its turn is stopped (SIGSTOP).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from ..machine import available_bytes
from ..results import Progress
from .candidates import Candidate, missing
from .contract import Job, UnavailableError
from .pair import CLOSE_S, CandidateError, Pair
from .payloads import Payload
from .results import Measurement, Status

SEED = 20
PROCESS_BYTES = 45 << 20
SHARE_OF_MEMORY = 0.75


class Entry(msgspec.Struct, frozen=True):
    """A candidate with a payload, in the comparison or as a point of a sweep."""

    candidate: Candidate
    payload: Payload
    sweep: str = ""
    x: float = 0.0
    copies: float = 3
    """How many payloads of memory it takes: source, destination, and a pool or a frame."""

    @property
    def bytes_needed(self) -> int:
        return int(self.payload.size * self.copies) + 2 * PROCESS_BYTES


def measure(
    entries: Sequence[Entry], rounds: int, folder: str, timeout_s: float, progress: Progress
) -> list[Measurement]:
    """Measures ``rounds`` rounds of each entry, after one that warms up.

    An entry that is missing or fails is in the result with the reason.
    """
    done: list[Measurement] = []
    for number, group in enumerate(_groups(entries)):
        turns = _Turns(group, number, rounds, progress)
        turns.run(folder, timeout_s)
        done += turns.measurements
    return done


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yields parts of ``entries`` that fit into memory together."""
    budget = available_bytes() * SHARE_OF_MEMORY
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes_needed for e in group) + entry.bytes_needed > budget:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


class _Turns:
    """The rounds of entries that run together."""

    def __init__(self, entries: Sequence[Entry], group: int, rounds: int, progress: Progress) -> None:
        self.entries, self._rounds, self._progress = entries, rounds, progress
        self.measurements = [
            Measurement(
                candidate=e.candidate.key,
                label=e.candidate.label,
                kind=e.candidate.kind,
                payload=e.payload,
                group=group,
                sweep=e.sweep,
                x=e.x,
                options=dict(e.candidate.options),
            )
            for e in entries
        ]
        self._pairs: dict[int, Pair] = {}
        """Pairs that still take part, by the index of their entry."""

    def run(self, folder: str, timeout_s: float) -> None:
        with self._ending():
            for index in range(len(self.entries)):
                self._start(index, folder, timeout_s)
            for index in list(self._pairs):
                with self._surviving(index, self._rounds + 1):
                    self._pairs[index].connect()
                    self._pairs[index].park()
            shuffle = random.Random(SEED)
            for number in range(self._rounds + 1):
                order = list(self._pairs)
                shuffle.shuffle(order)
                for index in order:
                    self._say(index, "", 1)
                    with self._surviving(index, self._rounds - number):
                        self._turn(index, number)

    def _start(self, index: int, folder: str, timeout_s: float) -> None:
        entry = self.entries[index]
        self._say(index, "starting ", 0)
        if reason := missing(entry.candidate):
            self._leave(index, "missing", reason, self._rounds + 1)
        elif entry.bytes_needed > available_bytes() * SHARE_OF_MEMORY and not self._pairs:
            self._leave(index, "skipped", f"needs {entry.bytes_needed / 1e9:.1f} GB of memory", self._rounds + 1)
        else:
            candidate, payload = entry.candidate, entry.payload
            job = Job(
                candidate=candidate.key.replace("/", "-"),
                factory=candidate.factory,
                tokens=payload.tokens,
                size=payload.size,
                options=candidate.options,
                folder=folder,
                timeout_s=timeout_s + payload.size / 50e6,
            )
            self._pairs[index] = pair = Pair(job)
            pair.begin()

    def _turn(self, index: int, number: int) -> None:
        pair = self._pairs[index]
        pair.resume()
        sample = pair.run(number)
        pair.park()
        self.measurements[index].pool_bytes = pair.pool_bytes
        if number > 0:  # the first round warms up
            self.measurements[index].samples.append(sample)

    @contextmanager
    def _surviving(self, index: int, left: int) -> Iterator[None]:
        """Ends a candidate that fails inside, so that the others go on. ``left`` rounds of it are not done."""
        try:
            yield
        except (CandidateError, UnavailableError) as error:
            self._pairs.pop(index).kill()
            self._leave(index, "missing" if isinstance(error, UnavailableError) else "error", str(error), left)

    def _leave(self, index: int, status: Status, reason: str, rounds: int) -> None:
        self.measurements[index].status, self.measurements[index].reason = status, reason
        self._say(index, f"{status}: ", rounds)

    def _say(self, index: int, what: str, rounds: int) -> None:
        measurement = self.measurements[index]
        self._progress(f"{measurement.payload.name}: {what}{measurement.label}", rounds)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends all processes on the way out."""
        try:
            yield
        finally:
            deadline = time.monotonic() + CLOSE_S
            for pair in self._pairs.values():
                pair.ask_to_close()
            for pair in self._pairs.values():
                pair.end(max(0.0, deadline - time.monotonic()))
