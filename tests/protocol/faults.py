"""Faults of a simulation: a peer that lies, and transports that break or are lost."""

from __future__ import annotations

from typing import Any

import msgspec

from embferry.protocol.errors import TransportError
from embferry.protocol.messages import Offer

from .ends import LanguageEnd, must
from .invariants import check_peer
from .simulation import Simulation


def lie(simulation: Simulation, end: LanguageEnd, **changes: Any) -> None:
    """The peer of a receiver announces something else than before, or a byte of its offer was damaged."""
    m = end.machine
    must(m.offered, "a first announcement cannot be told from the truth")
    said = Offer(end.room, m.generation, 1, m.transport, m.total_tokens, m.content_digest or b"", m.aux)
    m.receive(m.peer, m.session, msgspec.structs.replace(said, **changes), simulation.now)
    check_peer(simulation, end)
    simulation.run()


def break_transport(simulation: Simulation, name: str) -> None:
    """Breaks a transport: its writes fail and are not retryable. The other transport is never broken."""
    if not simulation.broken and may_lose(simulation, name):
        simulation.broken.add(name)
        for write in list(simulation.memory.in_flight):
            _, command = simulation.writer_of(write)
            if command.transport.name == name:
                simulation.fail_write(write, retryable=False)
    simulation.run()


def may_lose(simulation: Simulation, name: str) -> bool:
    """Returns whether every other transport works everywhere."""
    return simulation.broken | simulation.lost_here | simulation.lost_there <= {name}


def lose_transport(simulation: Simulation, name: str) -> None:
    """The language worker loses a transport, for all its transfers."""
    simulation.lost_here.add(name)
    for end in simulation.living_receivers():
        end.machine.transport_lost(name, TransportError("the engine has failed", retryable=False), simulation.now)
    simulation.run()


def lose_encoders_transport(simulation: Simulation, name: str) -> None:
    """The encode workers lose a transport: their writes over it fail, and land no further byte."""
    simulation.lost_there.add(name)
    for encoder in simulation.living_encoders():
        encoder.machine.transport_lost(name, TransportError("the engine has failed", retryable=False), simulation.now)
    for write in list(simulation.memory.in_flight):
        _, command = simulation.writer_of(write)
        if command.transport.name == name:
            simulation.fail_write(write, retryable=False)
    simulation.run()
