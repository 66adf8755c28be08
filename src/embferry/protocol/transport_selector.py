"""Which of the transports that both ends know is in use, and which were given up."""

from __future__ import annotations

from dataclasses import dataclass, field

from .messages import TransportAddress


@dataclass(slots=True)
class TransportSelector:
    """The transports shared with one receiver.

    Attributes:
        usable: The receiver's addresses, in the sender's order of preference; never empty. The first is in use.
        given_up: Addresses of transports that failed too often.
        failures: Failures in a row of the transport in use.
    """

    usable: list[TransportAddress]
    given_up: list[TransportAddress] = field(default_factory=list)
    failures: int = 0
    _counted: int = 0

    @property
    def current(self) -> TransportAddress:
        return self.usable[0]

    @property
    def names(self) -> set[str]:
        """The names of all shared transports, given up or not."""
        return {address.name for address in (*self.usable, *self.given_up)}

    def is_given_up(self, name: str) -> bool:
        return any(address.name == name for address in self.given_up)

    def worked(self, name: str) -> None:
        """A write over ``name`` is complete."""
        if name == self.current.name:
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
        if name != self.current.name or started <= self._counted:
            return False
        self._counted = latest
        self.failures += 1
        return self.failures >= limit

    def give_up(self, name: str) -> bool:
        """Switches to the next transport. Returns False if there is none, or if ``name`` was given up before."""
        if name != self.current.name or len(self.usable) == 1:
            return False
        self.given_up.append(self.usable.pop(0))
        self.failures = 0
        return True
