"""Candidates take turns: round k of all of them comes before round k+1 of any, in a shuffled order.

So other work of the machine affects all alike. A candidate that is not taking its turn is stopped (SIGSTOP).
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..machine import available_bytes
from ..results import Progress
from .candidates import Candidate, missing
from .contract import Job, UnavailableError
from .pair import CLOSE_S, KILL_S, CandidateError, Pair
from .payloads import Payload
from .results import Measurement, Status

SEED = 20
PROCESS_BYTES = 45 << 20
SHARE_OF_MEMORY = 0.75
TIMEOUT_S = 60.0
SLOWEST = 50e6
"""Bytes a second, below which a candidate is too slow."""


class Entry:
    """A candidate with a payload, in the comparison or as a point of a sweep.

    It takes ``copies`` payloads of memory: source, destination, and a pool or a frame.
    """

    def __init__(self, candidate: Candidate, payload: Payload, sweep: str = "", copies: float = 3) -> None:
        c = self.candidate = candidate
        self.bytes_needed = int(payload.size * copies) + 2 * PROCESS_BYTES
        self.result = Measurement(c.key, c.label, c.kind, payload, sweep=sweep, options=dict(c.options))

    def job(self, folder: str, timeout_s: float) -> Job:
        payload, c = self.result.payload, self.candidate
        return Job(c.factory, payload.tokens, payload.size, c.options, folder, timeout_s + payload.size / SLOWEST)


def measure(
    entries: Sequence[Entry], rounds: int, folder: str, progress: Progress, timeout_s: float = TIMEOUT_S
) -> list[Measurement]:
    """Measures ``rounds`` rounds of each entry, after one that warms up.

    An entry that is missing or fails is in the result with the reason.
    """
    for number, group in enumerate(_groups(entries)):
        for entry in group:
            entry.result.group = number
        _take_turns(group, rounds, folder, progress, timeout_s)
    return [entry.result for entry in entries]


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


def _take_turns(entries: list[Entry], rounds: int, folder: str, progress: Progress, timeout_s: float) -> None:
    """Runs the rounds of entries that fit into memory together. Leaves no process."""
    pairs: dict[Entry, Pair] = {}  # of the entries that still take part

    def say(entry: Entry, what: str, done: int) -> None:
        progress(f"{entry.result.payload.name}: {what}{entry.result.label}", done)

    def leave(entry: Entry, status: Status, reason: str, left: int) -> None:
        entry.result.status, entry.result.reason = status, reason
        say(entry, f"{status}: ", left)

    @contextmanager
    def its_turn(entry: Entry, left: int) -> Iterator[Pair]:
        """Ends a candidate that fails inside, so that the others go on. ``left`` rounds of it are not done."""
        pair = pairs[entry]
        try:
            yield pair
            pair.signal(signal.SIGSTOP)
        except (CandidateError, UnavailableError) as error:
            pairs.pop(entry).close()
            pair.end(KILL_S)
            leave(entry, "missing" if isinstance(error, UnavailableError) else "error", str(error), left)

    try:
        for entry in entries:
            say(entry, "starting ", 0)
            if reason := missing(entry.candidate):
                leave(entry, "missing", reason, rounds + 1)
            elif entry.bytes_needed > available_bytes() * SHARE_OF_MEMORY and not pairs:
                leave(entry, "skipped", f"needs {entry.bytes_needed / 1e9:.1f} GB of memory", rounds + 1)
            else:
                pairs[entry] = Pair(entry.job(folder, timeout_s))
        for entry in list(pairs):
            with its_turn(entry, rounds + 1) as pair:
                pair.connect()
        shuffle = random.Random(SEED)
        for number in range(rounds + 1):
            order = list(pairs)
            shuffle.shuffle(order)
            for entry in order:
                say(entry, "", 1)
                with its_turn(entry, rounds - number) as pair:
                    pair.signal(signal.SIGCONT)
                    sample = pair.run(number)
                    entry.result.samples += [sample] if number else []  # the first round warms up
    finally:
        deadline = time.monotonic() + CLOSE_S
        for pair in pairs.values():
            pair.close()
        for pair in pairs.values():
            pair.end(max(0.0, deadline - time.monotonic()))
