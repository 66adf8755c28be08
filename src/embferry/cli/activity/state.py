"""The activity of a router as it is now, by all that it has told. Pure: no input, no output, no clock."""

from __future__ import annotations

from collections.abc import Iterable

from embferry.cli.activity.told import Event, Pool, Request, Sample, Told, Worker
from embferry.serve.http.journal import MAX_ENDED, MAX_EVENTS, MAX_SHOWN, SAMPLED_SECONDS


class Activity:
    """All that a reader of the stream has by now: the same as one that asks for everything.

    Attributes:
        told: the latest message; its ``requests``, ``events`` and ``samples`` are only what had changed.
        requests: by number: those under way, and the latest that have ended.
    """

    def __init__(self, told: Told, at: float) -> None:
        self._events: dict[int, Event] = {}
        self._samples: dict[str, dict[float, Sample]] = {}
        self.requests: dict[int, Request] = {}
        self._stopped: float | None = None
        self.apply(told, at)

    def apply(self, told: Told, at: float) -> None:
        """Takes a message.

        Args:
            told: the message.
            at: seconds of the reader's monotonic clock.
        """
        if told.first:
            self.requests, self._events, self._samples = {}, {}, {}
        self.told, self._offset, self._stopped = told, told.now - at, None
        self.requests |= {request.number: request for request in told.requests}
        kept = {*told.running[:MAX_SHOWN], *(request.number for request in self.ended()[:MAX_ENDED])}
        self.requests = {number: request for number, request in self.requests.items() if number in kept}
        self._events |= {event.id: event for event in told.events}
        self._events = {id: self._events[id] for id in sorted(self._events)[-MAX_EVENTS:]}
        for series, samples in told.samples.items():
            kept_samples = self._samples.get(series, {}) | {sample.second: sample for sample in samples}
            first = int(told.now) - SAMPLED_SECONDS
            self._samples[series] = {second: one for second, one in kept_samples.items() if second > first}

    def stop(self, at: float) -> None:
        """Notes that no more is heard of the router: its time stands still until the next message."""
        if self._stopped is None:
            self._stopped = self.now(at)

    def now(self, at: float) -> float:
        """Returns the time of the router's journal at a time of the reader's clock."""
        return at + self._offset if self._stopped is None else self._stopped

    def running(self) -> list[Request]:
        """Returns the requests under way that the router tells of, the oldest first."""
        return [self.requests[number] for number in self.told.running if number in self.requests]

    def ended(self) -> list[Request]:
        """Returns those that have ended, the latest first."""
        over = [request for request in self.requests.values() if request.ended is not None]
        return sorted(over, key=lambda request: (request.ended or 0.0, request.number), reverse=True)

    def events(self) -> list[Event]:
        """Returns the events, the latest first."""
        return sorted(self._events.values(), key=lambda event: (event.at, event.id), reverse=True)

    def samples(self, series: str, since: float) -> list[Sample]:
        """Returns the samples of a series from a second of the journal on, the earliest first."""
        return sorted((one for one in self._samples.get(series, {}).values() if one.second >= since), key=_second)

    def worker(self, id: str) -> Worker | None:
        """Returns a worker that the router knows now."""
        return next((worker for worker in self.told.workers if worker.id == id), None)

    def pool(self, worker: str) -> Pool | None:
        """Returns the receive pool of a worker, if it is told."""
        return next((pool for pool in self.told.pools or () if pool.worker == worker), None)

    def name(self, id: str) -> str:
        """Returns the short name of a worker: its role and its place among those of it; its id once it is gone."""
        worker = self.worker(id)
        if worker is None:
            return id
        alike = [one for one in self.told.workers if one.role == worker.role]
        return f"{worker.role} {alike.index(worker)}"


def mean_of(samples: Iterable[Sample]) -> float | None:
    """Returns the mean of all times in samples; None without any."""
    samples = list(samples)
    count = sum(sample.count for sample in samples)
    return sum(sample.total for sample in samples) / count if count else None


def _second(sample: Sample) -> float:
    return sample.second
