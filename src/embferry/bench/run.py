"""One run: the comparison with each payload, then the sweeps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from . import machine, sweeps
from .contestants import Contestant
from .harness import Entry, Report, measure
from .payloads import Payload
from .plan import Plan, plan
from .results import SCHEMA, Results

TIMEOUT_S = 60.0


class Choice(msgspec.Struct, frozen=True):
    """What the user asked for."""

    payloads: tuple[Payload, ...]
    only: tuple[Contestant, ...] | None
    rounds: int | None
    quick: bool
    sweeps: bool
    storage: str | None
    """The folder that stands for shared storage; a temporary one if None."""
    command: str


class Work(msgspec.Struct, frozen=True):
    """All that is to be measured; what one list has takes turns."""

    plans: tuple[Plan, ...]
    swept: tuple[tuple[int, tuple[Entry, ...]], ...]
    """Rounds and points of each sweep."""

    @property
    def rounds(self) -> int:
        """Of everything, those that warm up included: for a progress bar."""
        compared = sum(len(plan.entries) * (plan.rounds + 1) for plan in self.plans)
        return compared + sum(len(points) * (rounds + 1) for rounds, points in self.swept)


def work(choice: Choice) -> Work:
    plans = tuple(plan(payload, choice.only, choice.rounds, quick=choice.quick) for payload in choice.payloads)
    points = sweeps.entries() if choice.sweeps else ()
    return Work(plans, tuple((choice.rounds or sweeps.rounds(p), tuple(p)) for p in points))


def run(choice: Choice, todo: Work, report: Report) -> Results:
    """Measures it all. Nothing remains of it but the results: no process, no file, no shared memory."""
    started, began = datetime.now(UTC), time.monotonic()
    measurements = []
    with tempfile.TemporaryDirectory(prefix="embferry-bench-", dir=choice.storage) as folder:
        for planned in todo.plans:
            measurements += measure(planned.entries, planned.rounds, folder, TIMEOUT_S, report)
        for rounds, points in todo.swept:
            measurements += measure(points, rounds, folder, TIMEOUT_S, report)
    return Results(
        schema=SCHEMA,
        command=choice.command,
        started=started.isoformat(timespec="seconds"),
        took_s=round(time.monotonic() - began, 1),
        quick=choice.quick,
        machine=machine.describe(),
        measurements=measurements,
    )


def failed(results: Results) -> Sequence[str]:
    """The reasons of those that took part and failed."""
    return [f"{m.label}, {m.payload.name}: {m.reason}" for m in results.measurements if m.status == "error"]
