"""What must hold after every event, whatever it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embferry.protocol.commands import Deliver
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.states import TERMINAL, KVPoll, Phase
from embferry.testing.network import Flight

from .ends import Content, InvariantError, LanguageEnd, must

if TYPE_CHECKING:
    from .simulation import World

PEERLESS = (Phase.BOOTSTRAPPING, Phase.RESUMING)
MOVING = (Phase.TRANSFERRING, Phase.RESUMING)


def check(world: World) -> None:
    """Everything that can be seen at rest."""
    check_blocks(world)
    for end in world.living_receivers():
        check_receiver(end)
    for encoder in world.living_encoders():
        s = encoder.machine
        must((s.phase is Phase.FAILED) == (s.error is not None), "failed without an error, or the other way round")
        must((s.current is None) <= (s.phase in (Phase.BOOTSTRAPPING, Phase.FAILED)), f"{s.phase} with nobody")


def check_blocks(world: World) -> None:
    """Every block is free, or accounted for by exactly one transfer."""
    try:
        world.allocator.check_integrity()
    except LocalProtocolError as error:
        raise InvariantError(str(error)) from error
    named = [block for end in world.living_receivers() for block in end.blocks()]
    named += [block for _, blocks in world.orphans.values() for block in blocks]
    held = [block for blocks in world.allocator.holders().values() for block in blocks]
    must(sorted(named) == sorted(held), f"blocks {sorted(held)} are out, {sorted(named)} are accounted for")


def check_receiver(end: LanguageEnd) -> None:
    m = end.machine
    end.peer = m.peer
    ended = m.phase in TERMINAL
    must((m.phase is Phase.FAILED) == (m.error is not None), "failed without an error, or the other way round")
    must(ended or (m.peer == 0) == (m.phase in PEERLESS), f"{m.phase} with peer {m.peer}")
    must((m.poll() is KVPoll.Transferring) == (m.phase in MOVING), f"{m.poll()} while {m.phase}")
    if m.phase is Phase.SUCCESS:
        must(m.transferred_tokens == m.total_tokens >= 0, "success before the end")
        must(end.delivered.prefix == m.total_tokens, "success, but not delivered")
    must(m.transferred_tokens >= end.best.get(m.content_digest, 0), "the offset moves back")
    if not ended:
        end.best = {m.content_digest: m.transferred_tokens}


def check_peer(world: World, end: LanguageEnd) -> None:
    """After a message: who is listened to now?"""
    before, end.peer = end.peer, end.machine.peer
    if end.peer in (0, before):
        return
    must(before == 0, f"room {end.room}: the peer was exchanged without having been lost")
    died = [e.died_at for e in world.encoders if e.machine.session == end.peer]
    late = any(at is not None and at < end.opened_at for at in died)
    must(bool(died) and not late, f"room {end.room}: took up with a sender that had ended before it was asked")


def check_landing(world: World, flight: Flight, block: int) -> None:
    """No byte lands in a block that belongs to someone else, or to nobody, or that was reported as written."""
    owner = world.block_epoch.get(block)
    must(owner == flight.epoch, f"a write of epoch {flight.epoch} lands in block {block}, now of epoch {owner}")
    must(block not in world.closed, f"a write of epoch {flight.epoch} lands in block {block}, reported as written")


def check_bytes(world: World, end: LanguageEnd, chunk: Deliver) -> None:
    """What lies in the blocks is what was sent, token by token."""
    content = Content.of(end.machine.content_digest or b"")
    sent = b"".join(content.token(t) for t in range(chunk.offset, chunk.offset + chunk.length))
    same = world.memory.read(chunk.blocks, chunk.length) == sent
    must(same, f"room {end.room}: tokens from {chunk.offset} on are not what was sent")


def check_delivery(world: World, end: LanguageEnd, chunk: Deliver) -> None:
    """Every token of one content is delivered once."""
    stop = chunk.offset + chunk.length
    must(stop <= end.machine.total_tokens, f"room {end.room}: tokens beyond the end were delivered")
    again = end.delivered.overlaps(chunk.offset, stop)
    must(not again, f"room {end.room}: tokens [{chunk.offset}, {stop}) are delivered twice")
    end.delivered.add(chunk.offset, stop)
    check_bytes(world, end, chunk)
