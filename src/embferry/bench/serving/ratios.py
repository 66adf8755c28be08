"""Ratios of medians, each of the same requests in the same round: for configurations that ran side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from ..report import NONE, Row, Table
from .results import Run

Rounds = Mapping[str, Mapping[str, Sequence[Run]]]
"""Rounds by the title of the scenario and the name of the configuration."""
Figure = Callable[[Run], float | None]


def ttft(run: Run) -> float | None:
    """Returns the median time to first token of right answers, in seconds."""
    return run.times["TTFT"].median


def cpu(run: Run) -> float | None:
    """Returns the CPU seconds of all servers, for each request that was answered."""
    return None if run.cpu_seconds is None or not run.right else run.cpu_seconds / len(run.right)


def again(run: Run) -> tuple[float, float] | None:
    """Returns the median times to first token, in seconds, for new pictures and for those that were sent before."""
    times = [(bool(sample.repeated), sample.ttft) for sample in run.right if sample.ttft is not None]
    new, old = ([ttft for repeated, ttft in times if repeated is which] for which in (False, True))
    return (statistics.median(new), statistics.median(old)) if old and new else None


def ratio(figure: Figure, of: Sequence[Run], to: Sequence[Run]) -> float | None:
    """Returns the median of a figure's ratios, each of two runs in the same round; None if there is no such round."""
    others = {run.round: value for run in to if (value := figure(run))}
    found = [value / others[run.round] for run in of if run.round in others and (value := figure(run)) is not None]
    return statistics.median(found) if found else None


def tables(scenarios: Rounds) -> list[Table]:
    """Returns one table for each figure; the last one of scenarios that send pictures one by one, and again."""
    made = [
        _table("Time to first token", "ms", scenarios, ttft, 1e3),
        _table("CPU time of all servers a request", "ms", scenarios, cpu, 1e3),
    ]
    rows = []
    for scenario, by_name in scenarios.items():
        for rounds in by_name.values():
            times = [found for run in rounds if run.plan is None and (found := again(run)) is not None]
            if times:
                news, olds = [f"{statistics.median(each) * 1e3:.0f}" for each in zip(*times, strict=True)]
                share = statistics.median([old / new for new, old in times])
                rows.append(Row((rounds[0].title, scenario, news, olds, f"{share:.2f}"), kind(rounds[0].name)))
    if rows:
        columns = ("configuration", "scenario", "first ms", "again ms", "again / first")
        note = "Time to first token of the first and the second request with a picture. Medians of rounds."
        made.append(Table("The same picture again", columns, tuple(rows), note))
    return made


def _table(title: str, unit: str, scenarios: Rounds, figure: Figure, scale: float) -> Table:
    names = list(dict.fromkeys(name for by_name in scenarios.values() for name in by_name))
    rows = []
    for scenario, by_name in scenarios.items():
        for name, rounds in by_name.items():
            found = [value for run in rounds if (value := figure(run)) is not None]
            if not found:
                continue
            ratios = [None if other == name else ratio(figure, rounds, by_name.get(other, ())) for other in names]
            texts = [NONE if each is None else f"{each:.2f}" for each in ratios]
            median = f"{statistics.median(found) * scale:.0f}"
            rows.append(Row((rounds[0].title, scenario, median, *texts), kind(name)))
    columns = ("configuration", "scenario", unit, *(f"/ {name}" for name in names))
    note = "Medians of rounds: of each round's median, and of the ratios of both medians of a round."
    return Table(title, columns, tuple(rows), note)


def kind(name: str) -> str:
    """Returns the kind of a configuration's rows, which selects their colour."""
    return "ours" if name.startswith("ours") else "limit" if name == "undivided" else "engine"
