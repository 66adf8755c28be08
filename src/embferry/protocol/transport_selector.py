"""Which of the transports that both ends know is in use, and which were given up."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from .messages import TransportAddress


@dataclass(slots=True)
class TransportSelector:
    """The transports shared with one receiver.

    Attributes:
        usable: The receiver's addresses, in the sender's order of preference. The first is in use. Empty only after
            :meth:`lose` has returned False.
        given_up: Addresses of transports that failed too often, and of lost ones.
        lost: Names of transports that one of the ends does not have any more.
        failures: Failures in a row of the transport in use.
    """

    usable: list[TransportAddress]
    given_up: list[TransportAddress] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    failures: int = 0
    _counted: int = 0

    @property
    def current(self) -> TransportAddress:
        return self.usable[0]

    @property
    def names(self) -> set[str]:
        """The names of all shared transports, given up or not."""
        return {address.name for address in self._every()}

    def _every(self) -> list[TransportAddress]:
        return [*self.usable, *self.given_up]

    def is_given_up(self, name: str) -> bool:
        return any(address.name == name for address in self.given_up)

    def worked(self, name: str) -> None:
        """A write over ``name`` is complete."""
        if self.usable and name == self.current.name:
            self.failures = 0

    def failed(self, name: str, *, started: int, latest: int, limit: int) -> bool:
        """Counts a failed write. Writes that were in flight together and fail together count once.

        Args:
            name: The transport of the write.
            started: Ordinal of the write among all writes of the transfer.
            latest: Ordinal of the write that was started last.
            limit: Failures in a row after which the transport is given up.

        Returns:
            Whether the limit is reached.
        """
        if not self.usable or name != self.current.name or started <= self._counted:
            return False
        self._counted = latest
        self.failures += 1
        return self.failures >= limit

    def give_up(self, name: str) -> bool:
        """Switches to the next transport. Returns False if there is none, or if ``name`` was given up before."""
        if len(self.usable) < 2 or name != self.current.name:
            return False
        self.given_up.append(self.usable.pop(0))
        self.failures = 0
        return True

    def has_other_than(self, names: Container[str]) -> bool:
        """Returns whether a transport would be left if these were lost."""
        return any(address.name not in names and address.name not in self.lost for address in self._every())

    def lose(self, names: Container[str]) -> bool:
        """Never uses these transports again. If no other is left, those given up for their failures are tried again.

        Returns:
            Whether there is a transport to use.
        """
        every, before = self._every(), self.usable[:1]
        self.lost |= {address.name for address in every if address.name in names}
        remaining = [address for address in every if address.name not in self.lost]
        self.usable = [address for address in remaining if address in self.usable] or remaining
        self.given_up = [address for address in every if address not in self.usable]
        if self.usable[:1] != before:
            self.failures = 0
        return bool(self.usable)
