"""The summary of a router as lines of text, and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from embferry.cli.activity.state import Activity
from embferry.cli.activity.summary import SERIES, Health, Summary, phases, recent, times
from embferry.cli.activity.told import Worker
from embferry.cli.activity.words import spent
from embferry.cli.ask import counted
from embferry.cli.wrapping import folded

COLOURS: dict[Health, str] = {"ready": "green", "degraded": "yellow", "not_ready": "red", "no_answer": "red"}
WORDS: dict[Health, str] = {
    "ready": "ready",
    "degraded": "degraded",
    "not_ready": "not ready",
    "no_answer": "no answer",
}
INDENT = 11
"""Columns of the word in front of a line."""
_NARROW = 40
"""Columns from which words stand in front of lines; on a narrower terminal they begin them."""


def as_lines(url: str, summary: Summary, seconds: float, width: int, *, colour: bool = False) -> list[str]:
    """Returns a router in a few lines.

    Args:
        url: the router's.
        summary: of it.
        seconds: the time that counts as recent.
        width: columns of the terminal; 0 for none, so that no line is broken.
        colour: whether the state is coloured.
    """
    activity = summary.activity
    state = WORDS[summary.health]
    about = "" if activity is None else f" · {', '.join(activity.told.models) or 'no model'} · {activity.told.router}"
    first = folded(f"{url} · {state}{about}", width)
    before, found, after = first.partition(f" {state}")
    if colour and found:  # the line may be broken within the words
        first = before + typer.style(found, fg=COLOURS[summary.health], bold=True) + after
    lines = [("why", reason) for reason in summary.reasons]
    if activity is not None:
        lines += _facts(activity, seconds)
    return [*first.split("\n"), *(line for label, text in lines for line in _labelled(label, text, width))]


def as_json(url: str, summary: Summary, seconds: float) -> dict[str, Any]:
    """Returns a router as ``--json`` has it. Fields may be added; docs/operations.md describes them."""
    activity = summary.activity
    head = {"url": url, "state": summary.health, "reasons": list(summary.reasons)}
    if activity is None:
        return head
    told, since = activity.told, activity.told.now - seconds
    return head | {
        "version": told.router,
        "engine": told.engine,
        "models": list(told.models),
        "workers": [
            {"id": one.id, "role": one.role, "url": one.url, "up": one.up, "requests": one.in_flight}
            | {"trouble": one.trouble}
            for one in told.workers
        ],
        "requests": {"under_way": told.under_way, "phases": phases(activity)},
        "pools": None
        if told.pools is None
        else [
            {"worker": pool.worker, "error": pool.error}
            | {"blocks": pool.num_blocks, "used": pool.used, "quarantined": pool.quarantined}
            for pool in told.pools
        ],
        "recent": {"seconds": seconds, **recent(activity, since)},
        "times": {series: times(activity.samples(series, since)) for series in SERIES},
    }


def pools_in_words(activity: Activity, workers: list[Worker]) -> str:
    """Returns how full the receive pools of some workers are, all together; "" if none is known."""
    pools = [pool for worker in workers if (pool := activity.pool(worker.id)) is not None and not pool.error]
    if not pools:
        return ""
    blocks, used, quarantined = (
        sum(getattr(pool, name) for pool in pools) for name in ("num_blocks", "used", "quarantined")
    )
    held = f", {quarantined:,} quarantined" if quarantined else ""
    return f"{used:,} of {counted(blocks, 'block')} in use{held}"


def _facts(activity: Activity, seconds: float) -> Iterator[tuple[str, str]]:
    told = activity.told
    for role in dict.fromkeys(["encode", *(worker.role for worker in told.workers)]):
        workers = [worker for worker in told.workers if worker.role == role]
        up = f"{sum(worker.up for worker in workers)} of {len(workers)} up" if workers else "none"
        busy = counted(sum(worker.in_flight for worker in workers), "request") if workers else ""
        yield role, ", ".join(filter(None, (up, busy, pools_in_words(activity, workers))))
    if all(worker.role == "encode" for worker in told.workers):
        yield "language", "none"
    here = ", ".join(f"{count:,} {phase}" for phase, count in sorted(phases(activity).items()))
    yield "requests", f"{told.under_way:,} under way{f': {here}' if here else ''}"
    counts = recent(activity, told.now - seconds)
    shown = [
        counted(counts["resumes"], "resumed transfer"),
        counted(counts["retries"], "retry"),
        counted(counts["failovers"], "failover"),
        counted(counts["errors"], "error"),
        *(counted(counts[name], thing) for name, thing in _RARE.items() if counts[name]),
        *([f"{counted(counts['clients_left'], 'client')} left"] if counts["clients_left"] else []),
    ]
    yield f"{seconds / 60:g} min", ", ".join(shown)
    taken = [
        f"{words} {spent(found['mean'])} (most {spent(found['highest'])})"
        for series, words in (("ttft", "first token"), ("transfer", "transfer"))
        if (found := times(activity.samples(series, told.now - seconds)))["count"]
    ]
    if taken:
        yield "times", ", ".join(taken)


_RARE = {
    "failed_calls": "failed call",
    "damaged_messages": "damaged message",
    "fallbacks": "fallback",
}
"""Numbers that are told only if there are any."""


def _labelled(label: str, text: str, width: int) -> list[str]:
    """Returns a line with its label, and those on which it goes on."""
    if width and width < _NARROW:
        return folded(f"{label}: {text}", width).split("\n")
    first, *rest = folded(text, max(1, width - INDENT - 2) if width else 0).split("\n")
    return [f"  {label:<{INDENT}}{first}".rstrip(), *(" " * (INDENT + 2) + line for line in rest)]
