"""The end of every simulation: faults stop, time passes, and every transfer must end."""

from __future__ import annotations

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.messages import Abort, Confirm, decode
from embferry.protocol.states import TERMINAL, Phase

from .ends import EncodeEnd, LanguageEnd, must
from .simulation import Simulation

LONGEST = 600.0  # seconds of virtual time within which every transfer must have ended
MOST_EVENTS = 20_000


def quiesce(simulation: Simulation) -> None:
    """Stops all faults and runs until every end has ended.

    Raises:
        InvariantError: An end does not end, blocks are missing, or a transfer failed without a cause.
    """
    simulation.network.heal()
    sure = [end for end in simulation.living_receivers() if must_succeed(simulation, end)]
    for encoder in simulation.living_encoders():
        if encoder.machine.phase not in TERMINAL:
            encoder.produce(encoder.content.total)
    simulation.run()
    begun = simulation.now
    for _ in range(MOST_EVENTS):
        if advance_without_faults(simulation):
            continue
        if not simulation.living_receivers() and not simulation.living_encoders():
            break
        simulation.tick(max(next_wake(simulation) - simulation.now, 0.001))
        must(simulation.now < begun + LONGEST, f"after {LONGEST} s these still wait: {pending(simulation)}")
    must(not pending(simulation), f"after {MOST_EVENTS} events these have not ended: {pending(simulation)}")
    must(simulation.allocator.available == simulation.allocator.num_blocks, "blocks are missing from the pool")
    for end in [*simulation.receivers, *simulation.encoders]:
        check_ended(end)
    for end in sure:
        ended_well = end.machine.phase is Phase.SUCCESS
        must(ended_well, f"room {end.room} failed without a cause: {end.machine.error}")
        must(end.consumed.prefix == end.machine.total_tokens, f"room {end.room}: delivered tokens were not consumed")


def advance_without_faults(simulation: Simulation) -> bool:
    """Plays the next event of a run without faults. Returns False if only a timer can cause one."""
    if simulation.network.packets:
        simulation.deliver(0)
    elif simulation.memory.in_flight:
        simulation.complete(simulation.memory.in_flight[0])
    elif simulation.memory.revoking:
        simulation.revoke(0)
    else:
        for end in simulation.living_receivers():
            if end.checks:
                simulation.verify(end)
                return True
            if end.queue:
                simulation.consume(end)
                return True
        return False
    return True


def next_wake(simulation: Simulation) -> float:
    times = [simulation.now + simulation.settings.linger]
    for end in [*simulation.living_receivers(), *simulation.living_encoders()]:
        due = end.machine.next_timeout()
        times += [] if due is None else [due]
    return min(times)


def pending(simulation: Simulation) -> list[str]:
    ends = [*simulation.living_receivers(), *simulation.living_encoders()]
    return [f"{type(end).__name__} of room {end.room}, {end.machine.phase.name}" for end in ends]


def check_ended(end: LanguageEnd | EncodeEnd) -> None:
    """Checks that the error of a failed end names its cause and its room."""
    error = end.machine.error
    if end.machine.phase is Phase.FAILED:
        must(error is not None and type(error) is not EmbeddingTransferError, f"a general error: {error}")
        assert error is not None
        must(bool(error.detail) and error.room == end.room, f"an error without a detail or a room: {error!r}")


def must_succeed(simulation: Simulation, end: LanguageEnd) -> bool:
    """Returns whether nothing that has happened so far may cause a failure of the transfer."""
    host = simulation.hosts.get(end.endpoint)
    if host is None or end.machine.phase in TERMINAL or host.machine.phase in TERMINAL:
        return False
    m, slack = end.machine, 3 * simulation.settings.retry_limit
    rivals = [other for other in simulation.living_receivers() if other.room == end.room and other is not end]
    same = m.content_digest in (None, host.content.digest) or not m.committed
    due = [deadline for deadline, _ in m.deadlines()] + [host.machine.next_timeout() or 0.0]
    known = host.machine.destinations.get(m.session)
    stranded = known is not None and {transport.name for transport in known.transports.usable} <= simulation.broken
    # A write that is refused before the sender hears of the new generation makes it give up the transport.
    raced = known is not None and bool(simulation.broken) and known.opened.generation < m.generation
    excused = (
        end_is_in_flight(simulation, end.room) or end.room in simulation.unrecoverable or rivals or stranded or raced
    )
    retries_left = m.retry_policy.bad_in_a_row < 8 and m.retry_policy.lost_in_a_row < 8
    return same and not excused and retries_left and all(time - simulation.now > slack for time in due)


def end_is_in_flight(simulation: Simulation, room: int) -> bool:
    """Returns whether a message that ends the room is in flight."""
    bodies = [decode(packet.data).body for packet in simulation.network.packets]
    return any(isinstance(body, Abort | Confirm) and body.room == room for body in bodies)
