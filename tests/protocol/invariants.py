"""Invariants of the simulation, checked after every event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embferry.protocol.commands import Deliver
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.states import TERMINAL, KVPoll, Phase
from embferry.testing.network import InFlightWrite

from .ends import Content, InvariantError, LanguageEnd, must

if TYPE_CHECKING:
    from .simulation import Simulation

PEERLESS = (Phase.BOOTSTRAPPING, Phase.RESUMING)
MOVING = (Phase.TRANSFERRING, Phase.RESUMING)


def check(simulation: Simulation) -> None:
    """Checks every invariant that holds between events."""
    check_blocks(simulation)
    for end in simulation.living_receivers():
        check_receiver(end)
        check_announcement(simulation, end)
    for encoder in simulation.living_encoders():
        s = encoder.machine
        must((s.phase is Phase.FAILED) == (s.error is not None), "failed without an error, or an error without failure")
        must((s.current is None) <= (s.phase in (Phase.BOOTSTRAPPING, Phase.FAILED)), f"{s.phase} without a receiver")


def check_blocks(simulation: Simulation) -> None:
    """Checks that every block is free or belongs to exactly one transfer."""
    try:
        simulation.allocator.check_integrity()
    except LocalProtocolError as error:
        raise InvariantError(str(error)) from error
    named = [block for end in simulation.living_receivers() for block in end.blocks()]
    named += [block for _, blocks in simulation.orphans.values() for block in blocks]
    held = [block for blocks in simulation.allocator.holders().values() for block in blocks]
    must(sorted(named) == sorted(held), f"blocks {sorted(held)} are allocated, but transfers hold {sorted(named)}")


def check_receiver(end: LanguageEnd) -> None:
    m = end.machine
    end.peer = m.peer
    ended = m.phase in TERMINAL
    must((m.phase is Phase.FAILED) == (m.error is not None), "failed without an error, or an error without failure")
    must(ended or (m.peer == 0) == (m.phase in PEERLESS), f"{m.phase} with peer {m.peer}")
    must((m.poll() is KVPoll.Transferring) == (m.phase in MOVING), f"{m.poll()} while {m.phase}")
    if m.phase is Phase.SUCCESS:
        must(m.transferred_tokens == m.total_tokens >= 0, "success before the last token")
        must(end.delivered.prefix == m.total_tokens, "success, but not everything was delivered")
    must(m.transferred_tokens >= end.best.get(m.content_digest, 0), "the number of transferred tokens decreased")
    if not ended:
        end.best = {m.content_digest: m.transferred_tokens}


def check_announcement(simulation: Simulation, end: LanguageEnd) -> None:
    """Checks that a receiver believes what its peer has, not what others say."""
    m = end.machine
    if m.total_tokens >= 0:
        must(Content.of(m.content_digest or b"").total == m.total_tokens, f"{m.total_tokens} tokens of another content")
    if m.offered and m.phase not in TERMINAL:
        contents = [e.content.digest for e in simulation.encoders if e.machine.session == m.peer]
        must(contents == [m.content_digest], "the peer has another content than the receiver believes")
        must(m.aux == (), "the peer has announced other values with the length")
        must(end.kept in (None, m.content_digest), "kept tokens of another content are used")


def check_peer(simulation: Simulation, end: LanguageEnd) -> None:
    """Checks a change of the peer after a message: the old peer was lost, and the new one lives."""
    before, end.peer = end.peer, end.machine.peer
    if end.peer in (0, before):
        return
    must(before == 0, f"room {end.room}: the peer changed without having been lost")
    died = [e.died_at for e in simulation.encoders if e.machine.session == end.peer]
    late = any(at is not None and at < end.opened_at for at in died)
    must(
        bool(died) and not late, f"room {end.room}: accepted a sender that had ended before this generation was opened"
    )


def check_write(simulation: Simulation, write: InFlightWrite, block: int) -> None:
    """Checks that a byte lands in a block of its own epoch that has not been reported as written."""
    owner = simulation.block_epoch.get(block)
    must(owner == write.epoch, f"a write under epoch {write.epoch} lands in block {block}, now of epoch {owner}")
    must(
        block not in simulation.closed,
        f"a write under epoch {write.epoch} lands in block {block}, already reported as written",
    )


def check_bytes(simulation: Simulation, end: LanguageEnd, chunk: Deliver) -> None:
    """Checks that the blocks hold the tokens that were sent."""
    content = Content.of(end.machine.content_digest or b"")
    sent = b"".join(content.token(t) for t in range(chunk.offset, chunk.offset + chunk.length))
    same = simulation.memory.read(chunk.blocks, chunk.length) == sent
    must(same, f"room {end.room}: the bytes from token {chunk.offset} on are not what was sent")


def check_delivery(simulation: Simulation, end: LanguageEnd, chunk: Deliver) -> None:
    """Checks that every token of one content is delivered once."""
    stop = chunk.offset + chunk.length
    must(stop <= end.machine.total_tokens, f"room {end.room}: tokens beyond the end were delivered")
    again = end.delivered.overlaps(chunk.offset, stop)
    must(not again, f"room {end.room}: tokens [{chunk.offset}, {stop}) are delivered twice")
    end.delivered.add(chunk.offset, stop)
    check_bytes(simulation, end, chunk)
