"""``open`` messages of receivers whose room is not open here yet: kept for a while, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from embferry.protocol.messages import Frame, Open, encode
from embferry.protocol.settings import TransferSettings


@dataclass(slots=True)
class _Parked:
    peer: Hashable
    frame: Frame
    size: int
    until: float


class ParkedRequests:
    """The latest ``open`` message of each room that is not open yet.

    A receiver repeats its request until it has an offer, so one that is dropped here comes again. Therefore the oldest
    makes room for the newest when a bound is reached.

    Args:
        settings: ``parked_requests`` and ``parked_bytes`` bound them; each is kept for ``bootstrap_timeout`` seconds.

    Attributes:
        nbytes: Their encoded size.
    """

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._by_room: OrderedDict[int, _Parked] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._by_room)

    def add(self, peer: Hashable, frame: Frame, now: float) -> None:
        """Keeps a request, in place of an earlier one for its room."""
        assert isinstance(frame.body, Open)
        self.take(frame.body.room)
        size = len(encode(frame))
        self._by_room[frame.body.room] = _Parked(peer, frame, size, now + self._settings.bootstrap_timeout)
        self.nbytes += size
        while len(self) > self._settings.parked_requests or self.nbytes > self._settings.parked_bytes:
            self.take(next(iter(self._by_room)))

    def take(self, room: int) -> tuple[Hashable, Frame] | None:
        """Removes and returns the request for a room, with its peer, or None."""
        parked = self._by_room.pop(room, None)
        if parked is None:
            return None
        self.nbytes -= parked.size
        return parked.peer, parked.frame

    def drop(self, peer: Hashable) -> None:
        """Removes the requests of a peer whose connection has ended."""
        for room in [room for room, parked in self._by_room.items() if parked.peer == peer]:
            self.take(room)

    @property
    def next_expiry(self) -> float | None:
        """When the oldest has been kept long enough; None: there is none."""
        return next(iter(self._by_room.values())).until if self._by_room else None

    def expire(self, now: float) -> None:
        """Removes the requests that have been kept long enough. They lie in the order of their times."""
        while self._by_room and next(iter(self._by_room.values())).until <= now:
            self.take(next(iter(self._by_room)))
