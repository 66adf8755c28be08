"""How every story ends: the faults stop, time goes on, and each transfer must come to its end."""

from __future__ import annotations

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import TERMINAL, Phase

from .ends import EncodeEnd, LanguageEnd, must
from .simulation import World

LONGEST = 600.0  # seconds of virtual time after which nothing may be undecided
MOST_EVENTS = 20_000


def quiesce(world: World) -> None:
    """Stops all faults, lets everybody finish, and checks that everybody has."""
    world.network.heal()
    sure = [end for end in world.living_receivers() if must_succeed(world, end)]
    for encoder in world.living_encoders():
        if encoder.machine.phase not in TERMINAL:
            encoder.produce(encoder.content.total)
    world.run()
    begun = world.now
    for _ in range(MOST_EVENTS):
        if calm_event(world):
            continue
        if not world.living_receivers() and not world.living_encoders():
            break
        world.tick(max(next_wake(world) - world.now, 0.001))
        must(world.now < begun + LONGEST, f"after {LONGEST} s somebody still waits: {pending(world)}")
    must(not pending(world), f"no end in sight: {pending(world)}")
    must(world.allocator.available == world.allocator.num_blocks, "blocks are missing from the pool")
    for end in [*world.receivers, *world.encoders]:
        check_ended(end)
    for end in sure:
        ended_well = end.machine.phase is Phase.SUCCESS
        must(ended_well, f"room {end.room} could have been transferred, but: {end.machine.error}")
        must(end.consumed.prefix == end.machine.total_tokens, f"room {end.room}: delivered is not consumed")


def calm_event(world: World) -> bool:
    """The next thing that happens of itself when nothing goes wrong; False if only time can tell."""
    if world.network.packets:
        world.deliver(0)
    elif world.memory.flights:
        world.complete(world.memory.flights[0])
    elif world.memory.revoking:
        world.revoke(0)
    else:
        for end in world.living_receivers():
            if end.checks:
                world.verify(end)
                return True
            if end.queue:
                world.consume(end)
                return True
        return False
    return True


def next_wake(world: World) -> float:
    times = [world.now + world.settings.linger]
    for end in [*world.living_receivers(), *world.living_encoders()]:
        due = end.machine.next_timeout()
        times += [] if due is None else [due]
    return min(times)


def pending(world: World) -> list[str]:
    ends = [*world.living_receivers(), *world.living_encoders()]
    return [f"{type(end).__name__} of room {end.room}, {end.machine.phase.name}" for end in ends]


def check_ended(end: LanguageEnd | EncodeEnd) -> None:
    """Ended in Success, or in an error that names its cause; those that were killed have no say."""
    error = end.machine.error
    if end.machine.phase is Phase.FAILED:
        must(error is not None and type(error) is not EmbeddingTransferError, f"an error without a name: {error}")
        assert error is not None
        must(bool(error.detail) and error.room == end.room, f"an error without a sentence or a room: {error!r}")


def must_succeed(world: World, end: LanguageEnd) -> bool:
    """Whether nothing that has happened so far excuses a failure."""
    host = world.hosts.get(end.endpoint)
    if host is None or end.machine.phase in TERMINAL or host.machine.phase in TERMINAL:
        return False
    m, slack = end.machine, 3 * world.settings.retry_limit
    rivals = [other for other in world.living_receivers() if other.room == end.room and other is not end]
    same = m.content_digest in (None, host.content.digest) or not m.committed
    due = [deadline for deadline, _ in m.deadlines()] + [host.machine.next_timeout() or 0.0]
    known = host.machine.destinations.get(m.session)
    stranded = known is not None and {transport.name for transport in known.transports.usable} <= world.broken
    # A write that is refused before the sender hears that its grant was taken back costs it the transport.
    raced = known is not None and bool(world.broken) and known.opened.generation < m.generation
    excused = world.last_words_on_the_way(end.room) or end.room in world.hopeless or rivals or stranded or raced
    patient = m.retry_policy.bad_in_a_row < 8 and m.retry_policy.lost_in_a_row < 8
    return same and not excused and patient and all(time - world.now > slack for time in due)
