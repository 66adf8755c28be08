"""The routers that are watched, and their requests in one list. Pure."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from embferry.cli.activity.state import Activity
from embferry.cli.activity.told import Request, Told

Key = tuple[int, int]
"""The place of a router, and the number of one of its requests."""


@dataclass(slots=True)
class Watched:
    """A router.

    Attributes:
        label: a letter in front of the numbers of its requests; "" for the only router.
        url: as it is shown.
        activity: what it has told; None before the first message.
        trouble: why nothing is heard of it now; "" while it is heard, and before the first attempt has ended.
        retry_at: when it is asked again, in seconds of the reader's clock.
        lost_at: since when nothing is heard.
        epoch: the wall clock at second 0 of its journal, in seconds, by the first message of the stream: by each
            message, the time of day of what has happened would change with the message's delay.
    """

    label: str
    url: str
    activity: Activity | None = None
    trouble: str = ""
    retry_at: float = 0.0
    lost_at: float = 0.0
    epoch: float = 0.0

    def unheard(self, at: float) -> float:
        """Returns the seconds for which nothing has been heard: by so much its time, which stands still, is behind."""
        return at - self.lost_at if self.trouble else 0.0

    def hear(self, told: Told, at: float, wall: float) -> None:
        """Takes a message, at a time of the reader's clock and the same moment in seconds of the epoch."""
        self.trouble = ""
        if self.activity is None or told.first:
            self.epoch = wall - told.now
        if self.activity is None:
            self.activity = Activity(told, at)
        else:
            self.activity.apply(told, at)

    def lose(self, why: str, at: float, pause: float) -> None:
        """Notes that the router cannot be heard, and that it is asked again after so many seconds."""
        if not self.trouble:
            self.lost_at = at
        self.trouble, self.retry_at = why, at + pause
        if self.activity is not None:
            self.activity.stop(at)


@dataclass(frozen=True, slots=True)
class Row:
    """A request of one of the routers, which is ``now`` seconds old by its journal."""

    key: Key
    router: Watched
    request: Request
    now: float

    @property
    def name(self) -> str:
        """The request's number, behind the label of its router."""
        return f"{self.router.label}#{self.request.number}"

    @property
    def seconds(self) -> float:
        """The time that it has taken."""
        return max(0.0, (self.now if self.request.ended is None else self.request.ended) - self.request.began)


class Board:
    """The routers.

    Args:
        urls: of the routers, as they are shown.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        letters = string.ascii_lowercase
        labels = [""] if len(urls) == 1 else [letters[n] if n < len(letters) else f"{n}" for n in range(len(urls))]
        self.routers = [Watched(label, url) for label, url in zip(labels, urls, strict=True)]

    def rows(self, at: float) -> list[Row]:
        """Returns the requests under way, the oldest first, then those that have ended, the latest first."""
        running: list[Row] = []
        ended: list[Row] = []
        for place, router in enumerate(self.routers):
            if (activity := router.activity) is not None:
                now = activity.now(at)
                running += [Row((place, one.number), router, one, now) for one in activity.running()]
                ended += [Row((place, one.number), router, one, now) for one in activity.ended()]
        running.sort(key=lambda row: -row.seconds)
        ended.sort(key=lambda row: row.now - (row.request.ended or 0.0))
        return running + ended

    def row(self, key: Key, at: float) -> Row | None:
        """Returns a request, if its router still tells of it."""
        place, number = key
        router = self.routers[place]
        activity = router.activity
        request = None if activity is None else activity.requests.get(number)
        return None if activity is None or request is None else Row(key, router, request, activity.now(at))

    def more(self) -> int:
        """Returns the number of requests under way that the routers do not tell of, because they are too many."""
        told = [router.activity.told for router in self.routers if router.activity is not None]
        return sum(max(0, one.under_way - len(one.running)) for one in told)
