"""The transports that both ends of a transfer know, and which of them still serves."""

from __future__ import annotations

from dataclasses import dataclass, field

from .messages import TransportAddress


@dataclass(slots=True)
class TransportSelector:
    """:ivar usable: the receiver's ends of them, the preferred one first; never empty. The first one is used."""

    usable: list[TransportAddress]
    given_up: list[TransportAddress] = field(default_factory=list)
    failures: int = 0
    _counted: int = 0

    @property
    def current(self) -> TransportAddress:
        return self.usable[0]

    @property
    def names(self) -> set[str]:
        """Of all of them, also of those given up."""
        return {transport.name for transport in (*self.usable, *self.given_up)}

    def is_given_up(self, name: str) -> bool:
        return any(transport.name == name for transport in self.given_up)

    def worked(self, name: str) -> None:
        """A write over it is complete."""
        if name == self.current.name:
            self.failures = 0

    def failed(self, name: str, *, started: int, latest: int, limit: int) -> bool:
        """A write over it, the ``started``-th of all, has failed; the ``latest``-th was the last to be started.

        Writes that were under way together fail together: they count once. Answers whether that was once too often."""
        if name != self.current.name or started <= self._counted:
            return False
        self._counted = latest
        self.failures += 1
        return self.failures >= limit

    def give_up(self, name: str) -> bool:
        """The next one is used from now on. False: there is none, or this one was given up before."""
        if name != self.current.name or len(self.usable) == 1:
            return False
        self.given_up.append(self.usable.pop(0))
        self.failures = 0
        return True
