"""A simulated network and a simulated one-sided memory: every interleaving, in memory, in microseconds.

Nothing here decides anything or draws a random number. What happens next is a call: of a fuzzer, of a test's script, of
a loop that wants peace. A message that nobody delivers is delayed; delivering the third one first is reordering; a
write lands as many bytes at a time as it is told to, and may land after its writer has died.

The memory is hostile unless it is ``gated``: closing blocks does not stop a write to them, as with a network card that
has the memory key. The only thing that stops one is a revocation, and that takes effect when the test says so.
:mod:`embferry.protocol` must keep data safe on these terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Flight", "Packet", "SimulatedMemory", "SimulatedNetwork"]


@dataclass(frozen=True, slots=True)
class Packet:
    """One message on its way."""

    source: str
    target: str
    data: bytes


class SimulatedNetwork:
    """Messages between addresses. Whoever holds it picks, by index into :attr:`packets`, which one does what."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.cut: set[frozenset[str]] = set()

    def send(self, source: str, target: str, data: bytes) -> None:
        """Puts a message on its way. Over a link that is cut it is lost."""
        if frozenset((source, target)) not in self.cut:
            self.packets.append(Packet(source, target, data))

    def deliver(self, index: int = 0) -> Packet:
        """The message has arrived: takes it off the network."""
        return self.packets.pop(index)

    def lose(self, index: int) -> None:
        del self.packets[index]

    def duplicate(self, index: int) -> None:
        """A copy goes to the end of the queue."""
        self.packets.append(self.packets[index])

    def partition(self, a: str, b: str) -> None:
        """From now on nothing gets from ``a`` to ``b`` or back; what is on its way is lost."""
        self.cut.add(frozenset((a, b)))
        self.packets = [p for p in self.packets if {p.source, p.target} != {a, b}]

    def heal(self) -> None:
        """Every link works again."""
        self.cut.clear()


@dataclass(eq=False, slots=True)
class Flight:
    """One one-sided write on its way.

    :ivar writer: whoever started it; the memory does not look at it.
    :ivar tokens: indices of the tokens, in the order in which they fill ``blocks``.
    :ivar read: the bytes of a token, read from the source when they land, not when the write was started.
    :ivar landed: bytes that have landed so far.
    """

    writer: object
    epoch: int
    blocks: tuple[int, ...]
    tokens: range
    read: Callable[[int], bytes]
    checksum: bytes
    landed: int = 0
    flips: set[int] = field(default_factory=set)
    refused: bool = False


class SimulatedMemory:
    """A region of ``num_blocks`` blocks of ``block_size`` tokens of ``token_bytes`` bytes, open to one-sided writes.

    :param gated: whether a write needs an admitted block, as with transports that check on the receiving side.
    :param on_landing: called with (flight, block) before a byte lands; raise there if it must not.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        token_bytes: int,
        *,
        gated: bool = False,
        on_landing: Callable[[Flight, int], None] = lambda flight, block: None,
    ) -> None:
        self.block_size = block_size
        self.token_bytes = token_bytes
        self.gated = gated
        self.on_landing = on_landing
        self.flights: list[Flight] = []
        self.revoking: list[int] = []  # asked for, not in effect yet
        self.revoked: set[int] = set()
        self._admitted: dict[int, set[int]] = {}  # epoch: blocks
        self._bytes = bytearray(num_blocks * block_size * token_bytes)

    # The receiver's side

    def admit(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._admitted.setdefault(epoch, set()).update(blocks)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        """Stops writes only where the memory is gated."""
        self._admitted.get(epoch, set()).difference_update(blocks)

    def revoke(self, epoch: int) -> None:
        """Asks for a revocation; it is in effect after :meth:`complete_revocation`."""
        self.revoking.append(epoch)

    def complete_revocation(self, index: int = 0) -> int:
        """From now on no write under the epoch, which is answered, lands a byte."""
        epoch = self.revoking.pop(index)
        self.revoked.add(epoch)
        return epoch

    def read(self, blocks: tuple[int, ...], tokens: int) -> bytes:
        """The bytes of so many tokens that fill ``blocks`` from their start."""
        size = self.block_size * self.token_bytes
        whole = b"".join(self._bytes[block * size : (block + 1) * size] for block in blocks)
        return whole[: tokens * self.token_bytes]

    # The writer's side

    def write(self, flight: Flight) -> None:
        """Starts a write."""
        self.flights.append(flight)

    def land(self, flight: Flight, count: int) -> None:
        """So many more bytes of it land."""
        end = min(flight.landed + count, len(flight.tokens) * self.token_bytes)
        for at in range(flight.landed, end):
            token, byte = divmod(at, self.token_bytes)
            block = flight.blocks[token // self.block_size]
            if not self._may_land(flight, block):
                flight.refused = True
                break
            self.on_landing(flight, block)
            value = flight.read(flight.tokens[token])[byte] ^ (at in flight.flips)
            slot = block * self.block_size + token % self.block_size
            self._bytes[slot * self.token_bytes + byte] = value
        flight.landed = end

    def finish(self, flight: Flight) -> bool:
        """All of the rest lands and the write is over. Answers whether every byte was let in."""
        self.land(flight, len(flight.tokens) * self.token_bytes)
        self.flights.remove(flight)
        return not flight.refused

    def drop(self, flight: Flight) -> None:
        """The write is over as it stands: failed, or lost with its writer."""
        self.flights.remove(flight)

    def _may_land(self, flight: Flight, block: int) -> bool:
        if flight.epoch in self.revoked:
            return False
        return not self.gated or block in self._admitted.get(flight.epoch, ())
