"""A router in one look: whether all is well and why not, and its numbers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from embferry.cli.activity.state import Activity, mean_of
from embferry.cli.activity.told import Sample
from embferry.cli.ask import counted

Health = Literal["ready", "degraded", "not_ready", "no_answer"]
"""States of a router, from the best to the worst.

``degraded``: it answers questions about pictures, but a worker is unfit or missing. ``not_ready``: it would refuse them
now. ``no_answer``: it says nothing.
"""
HEALTHS: tuple[Health, ...] = get_args(Health)

RECENT: Mapping[str, tuple[str, ...]] = {
    "resumes": ("resumed",),
    "retries": ("second_attempt", "encode_retry"),
    "failovers": ("failover",),
    "fallbacks": ("fallback",),
    "errors": ("error",),
    "failed_calls": ("worker_failed",),
    "damaged_messages": ("damaged",),
    "clients_left": ("client_left",),
}
"""The name of a number → the kinds of events that it counts."""
SERIES = ("ttft", "transfer")


@dataclass(frozen=True, slots=True)
class Expected:
    """The workers that there must be; fewer are degraded. Instances that only prefill or decode are languages."""

    encoders: int = 0
    languages: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A router in one look.

    Attributes:
        health: in one word.
        reasons: why it is not ``ready``, a sentence each.
        activity: what it has told; None if nothing.
    """

    health: Health
    reasons: tuple[str, ...]
    activity: Activity | None = None


def summary_of(activity: Activity, now: float, seconds: float, expected: Expected | None = None) -> Summary:
    """Returns the summary of a router that answers.

    Args:
        activity: what it has told.
        now: the time of its journal.
        seconds: the time within which a lost worker that has not been replaced counts.
        expected: the workers that there must be.
    """
    told = activity.told
    why = [
        *(
            f"{worker.role} {_place(worker.id, worker.url)}: {worker.trouble or 'it is not up'}"
            for worker in told.workers
            if not worker.up
        ),
        *(
            f"the receive pool of {activity.name(pool.worker)} is not known: {pool.error}"
            for pool in told.pools or ()
            if pool.error
        ),
        *_too_few(activity, expected or Expected()),
        *_lost(activity, now - seconds),
    ]
    health: Health = "not_ready" if told.missing else "degraded" if why else "ready"
    return Summary(health, (*told.missing, *why), activity)


def no_answer(why: str) -> Summary:
    """Returns the summary of a router that does not answer."""
    return Summary("no_answer", (why,))


def recent(activity: Activity, since: float) -> dict[str, int]:
    """Returns how often things have happened since a time of the journal.

    An event that has happened several times in a row counts with all of them if the last is within that time.
    """
    counts: Counter[str] = Counter()
    for event in activity.events():
        if event.at >= since:
            counts[event.kind] += event.count
    return {name: sum(counts[kind] for kind in kinds) for name, kinds in RECENT.items()}


def phases(activity: Activity) -> dict[str, int]:
    """Returns the number of requests under way that the router tells of, by phase."""
    return dict(Counter(request.phase for request in activity.running()))


def times(samples: list[Sample]) -> dict[str, Any]:
    """Returns the number, the mean and the highest of some times in seconds."""
    highest = max((sample.highest for sample in samples), default=None)
    return {"count": sum(sample.count for sample in samples), "mean": mean_of(samples), "highest": highest}


def worst(healths: list[Health]) -> Health:
    """Returns the worst of several routers' states."""
    return max(healths, key=HEALTHS.index)


def _place(id: str, url: str) -> str:
    """Returns the name of a worker for a sentence: its id, which before vLLM is its URL."""
    return id if id == url else f"{id} at {url}"


def _too_few(activity: Activity, expected: Expected) -> list[str]:
    up = [worker.role == "encode" for worker in activity.told.workers if worker.up]
    pairs = [(sum(up), expected.encoders, "encoder"), (len(up) - sum(up), expected.languages, "language instance")]
    return [
        f"{counted(there, thing)} {'is' if there == 1 else 'are'} up, and {wanted:,} must be"
        for there, wanted, thing in pairs
        if there < wanted
    ]


def _lost(activity: Activity, since: float) -> list[str]:
    """Returns a sentence for each role of which workers have been lost, without as many new ones since.

    Before vLLM an instance that is lost stays listed, and is told of as one that is not up.
    """
    lost: dict[str, list[str]] = {}
    for event in reversed(activity.events()):
        gone = lost.setdefault(event.role, [])
        if event.at >= since and event.kind == "worker_lost":
            gone.append(event.worker)
        elif event.kind == "worker_found" and gone:
            gone.remove(event.worker if event.worker in gone else gone[0])
    counts = {role: sum(activity.worker(id) is None for id in gone) for role, gone in sorted(lost.items())}
    return [
        f"{counted(count, f'{role} worker')} {'is' if count == 1 else 'are'} gone, and none has come instead"
        for role, count in counts.items()
        if count
    ]
