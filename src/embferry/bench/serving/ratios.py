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


def again(run: Run) -> float | None:
    """Returns the time to first token for pictures sent before, as a share of that for new ones, by their medians."""
    old = [sample.ttft for sample in run.right if sample.repeated and sample.ttft is not None]
    new = [sample.ttft for sample in run.right if not sample.repeated and sample.ttft is not None]
    return statistics.median(old) / statistics.median(new) if old and new else None


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
    rows = [
        Row((_title(rounds), scenario, f"{statistics.median(found):.2f}"), _kind(rounds))
        for scenario, by_name in scenarios.items()
        for rounds in by_name.values()
        if rounds[0].plan is None and (found := [value for run in rounds if (value := again(run)) is not None])
    ]
    note = "Time to first token of the second request with a picture, as a share of the first one's. Medians of rounds."
    if rows:
        made.append(Table("Again / first", ("configuration", "scenario", "ratio"), tuple(rows), note))
    return made


def _table(title: str, unit: str, scenarios: Rounds, figure: Figure, scale: float) -> Table:
    names = {run.name: run.title for by in scenarios.values() for rounds in by.values() for run in rounds}
    rows = []
    for scenario, by_name in scenarios.items():
        for name, rounds in by_name.items():
            found = [value for run in rounds if (value := figure(run)) is not None]
            if not found:
                continue
            ratios = [None if other == name else ratio(figure, rounds, by_name.get(other, ())) for other in names]
            texts = [NONE if each is None else f"{each:.2f}" for each in ratios]
            median = f"{statistics.median(found) * scale:.0f}"
            rows.append(Row((scenario, _title(rounds), median, *texts), _kind(rounds)))
    columns = ("scenario", "configuration", unit, *(f"/ {name}" for name in names))
    note = "Medians of rounds: of each round's median, and of the ratios of both medians of a round."
    return Table(title, columns, tuple(rows), note)


def _title(rounds: Sequence[Run]) -> str:
    return rounds[0].title


def _kind(rounds: Sequence[Run]) -> str:
    return "ours" if rounds[0].name.startswith("ours") else "limit" if rounds[0].name == "undivided" else "engine"
