"""A simulated network and a simulated region with one-sided writes. Every interleaving can be played in microseconds.

Nothing happens by itself and nothing is random: each event is a call, made by a fuzzer or by a test's script. A message
that is not delivered is delayed; delivering the third one first reorders; a write lands any number of bytes at a time,
also after its writer has died.

Unless the memory ``checks_windows``, closing blocks does not stop writes to them, as with a network card that has the
memory key. Then only a revocation stops a write, and it takes effect when the test says so. :mod:`embferry.protocol`
must keep data safe under these conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["InFlightWrite", "Packet", "SimulatedMemory", "SimulatedNetwork"]


@dataclass(frozen=True, slots=True)
class Packet:
    """One message in flight."""

    source: str
    target: str
    data: bytes


class SimulatedNetwork:
    """Messages between addresses. The caller picks the next message by its index in :attr:`packets`."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.cut: set[frozenset[str]] = set()

    def send(self, source: str, target: str, data: bytes) -> None:
        """Puts a message in flight. A cut link loses it."""
        if frozenset((source, target)) not in self.cut:
            self.packets.append(Packet(source, target, data))

    def deliver(self, index: int = 0) -> Packet:
        """Removes a message from the network and returns it."""
        return self.packets.pop(index)

    def lose(self, index: int) -> None:
        del self.packets[index]

    def duplicate(self, index: int) -> None:
        """Appends a copy of a message."""
        self.packets.append(self.packets[index])

    def partition(self, a: str, b: str) -> None:
        """Cuts the link between ``a`` and ``b`` in both directions. Messages in flight on it are lost."""
        self.cut.add(frozenset((a, b)))
        self.packets = [p for p in self.packets if {p.source, p.target} != {a, b}]

    def heal(self) -> None:
        """Repairs every link."""
        self.cut.clear()


@dataclass(eq=False, slots=True)
class InFlightWrite:
    """A one-sided write that has not ended.

    Attributes:
        writer: An object of the caller's that identifies the writer; the memory does not use it.
        tokens: Indices of the tokens, in the order in which they fill ``blocks``.
        read: Returns the bytes of a token. Called when they land, not when the write starts.
        landed: Number of bytes that have landed.
        flips: Positions of bytes that land with a flipped bit.
        refused: Whether a byte was refused.
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
    """A region that is open to one-sided writes.

    Args:
        block_size: Tokens per block.
        checks_windows: Whether a write outside admitted blocks is refused, as by transports that check on the receiving
            side.
        before_write: Called with (write, block) before a byte lands; raises if it must not land.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        token_bytes: int,
        *,
        checks_windows: bool = False,
        before_write: Callable[[InFlightWrite, int], None] = lambda write, block: None,
    ) -> None:
        self.block_size = block_size
        self.token_bytes = token_bytes
        self.checks_windows = checks_windows
        self.before_write = before_write
        self.in_flight: list[InFlightWrite] = []
        self.revoking: list[int] = []  # requested, not in effect yet
        self.revoked: set[int] = set()
        self._admitted: dict[int, set[int]] = {}  # epoch: blocks
        self._bytes = bytearray(num_blocks * block_size * token_bytes)

    # The receiver's side

    def admit(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._admitted.setdefault(epoch, set()).update(blocks)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        """Removes blocks from a window. Stops writes only if the memory checks windows."""
        self._admitted.get(epoch, set()).difference_update(blocks)

    def revoke(self, epoch: int) -> None:
        """Requests a revocation. It is in effect after :meth:`complete_revocation`."""
        self.revoking.append(epoch)

    def complete_revocation(self, index: int = 0) -> int:
        """Puts a requested revocation into effect and returns its epoch: no write under it lands a byte any more."""
        epoch = self.revoking.pop(index)
        self.revoked.add(epoch)
        return epoch

    def read(self, blocks: tuple[int, ...], tokens: int) -> bytes:
        """Returns the bytes of the first ``tokens`` tokens in ``blocks``."""
        size = self.block_size * self.token_bytes
        whole = b"".join(self._bytes[block * size : (block + 1) * size] for block in blocks)
        return whole[: tokens * self.token_bytes]

    # The writer's side

    def start(self, write: InFlightWrite) -> None:
        self.in_flight.append(write)

    def land(self, write: InFlightWrite, count: int) -> None:
        """Lands up to ``count`` more bytes of a write."""
        end = min(write.landed + count, len(write.tokens) * self.token_bytes)
        for at in range(write.landed, end):
            token, byte = divmod(at, self.token_bytes)
            block = write.blocks[token // self.block_size]
            if not self._may_land(write, block):
                write.refused = True
                break
            self.before_write(write, block)
            value = write.read(write.tokens[token])[byte] ^ (at in write.flips)
            slot = block * self.block_size + token % self.block_size
            self._bytes[slot * self.token_bytes + byte] = value
        write.landed = end

    def finish(self, write: InFlightWrite) -> bool:
        """Lands the rest of a write and ends it. Returns whether no byte of it was refused."""
        self.land(write, len(write.tokens) * self.token_bytes)
        self.in_flight.remove(write)
        return not write.refused

    def drop(self, write: InFlightWrite) -> None:
        """Ends a write without writing the rest: it failed, or its writer died."""
        self.in_flight.remove(write)

    def _may_land(self, write: InFlightWrite, block: int) -> bool:
        if write.epoch in self.revoked:
            return False
        return not self.checks_windows or block in self._admitted.get(write.epoch, ())
