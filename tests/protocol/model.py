"""A stateful model for hypothesis: every rule is one event, after which the invariants of the simulation must hold.

Each example ends with :func:`~.quiescence.quiesce`, so it also checks that every transfer ends.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from embferry.protocol.errors import Aborted, PeerGone, RemoteProtocolError
from embferry.protocol.states import TERMINAL

from . import faults
from .ends import Content, EncodeEnd, LanguageEnd, must
from .quiescence import advance_without_faults, next_wake, quiesce
from .simulation import LANGUAGE, TRANSPORTS, Simulation

ROOMS = st.integers(0, 2)
PICK = st.integers(0, 1 << 16)  # an index, modulo the number of candidates
TOTALS = st.one_of(st.integers(0, 12), st.integers(12, 40))


class TransferStories(RuleBasedStateMachine):
    """Several rooms, encode workers that start and end, and the pool of one language worker."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()
        self.next_content = 1

    @initialize(
        num_blocks=st.integers(1, 6),
        block_size=st.integers(1, 4),
        chunk_blocks=st.integers(1, 3),
        writes=st.integers(1, 3),
        default=st.integers(1, 20),
        progress=st.sampled_from((math.inf, math.inf, 3.0)),
        totals=st.lists(TOTALS, min_size=1, max_size=3),
        ready=st.integers(-1, 40),
    )
    def begin(
        self,
        num_blocks: int,
        block_size: int,
        chunk_blocks: int,
        writes: int,
        default: int,
        progress: float,
        totals: list[int],
        ready: int,
    ) -> None:
        self.simulation = Simulation(
            num_blocks,
            block_size,
            chunk_blocks=chunk_blocks,
            writes_in_flight=writes,
            default_tokens=default,
            progress_rate=progress,
        )
        for room, total in enumerate(totals):
            encoder = self.simulation.start_encoder(room, self.content(total))
            self.simulation.start_receiver(room)
            if ready >= 0:
                encoder.produce(ready)
                self.simulation.run()

    # Ends start and end

    @rule(
        what=st.sampled_from(
            (
                "encoder",
                "receiver",
                "restarted encoder",
                "restarted receiver",
                "receiver that has kept",
                "spare encoder",
                "back",
                "broken link",
                "no way",
            )
        ),
        pick=PICK,
        embedding=st.sampled_from(("same", "same length", "other")),
        total=TOTALS,
    )
    def start_end(self, what: str, pick: int, embedding: str, total: int) -> None:
        simulation, receiver, room = self.simulation, self.receiver(pick), pick % 3
        former = [end for end in simulation.encoders if end.room == (receiver.room if receiver else room)]
        if former and embedding == "same":
            content = former[-1].content
        else:
            content = self.content(former[-1].content.total if former and embedding == "same length" else total)
        if what == "encoder" and not any(end.room == room for end in simulation.living_encoders()):
            simulation.start_encoder(room, content)
        elif what == "receiver" and sum(end.room == room for end in simulation.living_receivers()) < 2:
            simulation.start_receiver(room)
        elif what == "restarted encoder" and former:
            simulation.start_encoder(former[-1].room, content, former[-1].address)
        elif receiver is None:
            return
        elif what == "restarted receiver":
            simulation.kill_receiver(receiver)
            simulation.start_receiver(receiver.room, receiver.endpoint)
        elif what == "receiver that has kept":  # the tokens of the one that it replaces
            kept = receiver.has()
            simulation.kill_receiver(receiver)
            simulation.start_receiver(receiver.room, receiver.endpoint, kept)
        elif what == "spare encoder":  # the first one may still live
            simulation.redirect(
                receiver, simulation.start_encoder(receiver.room, content, f"spare {simulation.steps}").address
            )
        elif what == "back":  # to a worker that it may have left, with the same content or another
            living = [end.address for end in simulation.living_encoders() if end.room == receiver.room]
            simulation.redirect(receiver, living[pick // 3 % len(living)] if living else receiver.endpoint)
        elif what == "broken link":
            simulation.redirect(receiver, receiver.endpoint)
        elif what == "no way":
            receiver.machine.peer_unreachable(PeerGone("connection refused"), simulation.now)
            simulation.run()

    @rule(what=st.sampled_from(("killed", "silent", "killed receiver", "abort", "refusal", "clear")), pick=PICK)
    def stop_end(self, what: str, pick: int) -> None:
        simulation, encoder, receiver = self.simulation, self.encoder(pick), self.receiver(pick)
        if encoder and what in ("killed", "silent"):
            simulation.kill_encoder(encoder, silent=what == "silent")
        elif encoder and what == "refusal":
            encoder.machine.abort(Aborted("asked for", room=encoder.room), simulation.now)
        elif receiver and what == "killed receiver":
            simulation.kill_receiver(receiver)
        elif receiver and what == "abort":
            receiver.machine.abort(Aborted("asked for", room=receiver.room), simulation.now)
        elif receiver and what == "clear":
            receiver.queue.clear()
            receiver.machine.clear(simulation.now)
        simulation.run()

    # The encoder

    @rule(pick=PICK, more=st.one_of(st.integers(0, 8), st.just(1 << 10)))
    def produce(self, pick: int, more: int) -> None:
        if end := self.encoder(pick):
            end.produce(end.machine.ready_tokens + more)
            self.simulation.run()

    @rule(
        pick=PICK,
        changes=st.sampled_from(({"content_digest": b"12345678"}, {"aux": (1,)}, None)),
        total=TOTALS,
        luck=st.integers(0, 4),
    )
    def lie(self, pick: int, changes: dict[str, Any] | None, total: int, luck: int) -> None:
        """Makes the peer contradict itself; rarely, because that ends the transfer."""
        end = self.receiver(pick)
        if luck != 3 or end is None or not end.machine.offered or end.machine.phase in TERMINAL:
            return
        if changes is None:
            changes = {"total_tokens": total + (total >= end.machine.total_tokens)}
        faults.lie(self.simulation, end, **changes)
        must(isinstance(end.machine.error, RemoteProtocolError), f"a lie was taken for the truth: {changes}")

    # Messages

    @precondition(lambda self: self.simulation.network.packets)
    @rule(pick=PICK)
    def deliver(self, pick: int) -> None:
        self.simulation.deliver(pick % len(self.simulation.network.packets))

    @precondition(lambda self: self.simulation.network.packets)
    @rule(count=st.integers(1, 6))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.simulation.network.packets))):
            self.simulation.deliver(0)

    @precondition(lambda self: self.simulation.network.packets)
    @rule(pick=PICK)
    def duplicate(self, pick: int) -> None:
        self.simulation.network.duplicate(pick % len(self.simulation.network.packets))

    @precondition(lambda self: self.simulation.network.packets)
    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        self.simulation.network.lose(pick % len(self.simulation.network.packets))

    @rule(room=ROOMS)
    def partition_or_heal(self, room: int) -> None:
        if self.simulation.network.cut:
            self.simulation.network.heal()
        else:
            self.simulation.network.partition(LANGUAGE, f"encode {room}")

    # Writes

    @precondition(lambda self: self.simulation.memory.in_flight)
    @rule(pick=PICK, count=st.integers(1, 24))
    def land(self, pick: int, count: int) -> None:
        in_flight = self.simulation.memory.in_flight
        self.simulation.land(in_flight[pick % len(in_flight)], count)

    @precondition(lambda self: self.simulation.memory.in_flight)
    @rule(pick=PICK, damaged=st.sampled_from((False, False, True)), at=PICK)
    def complete(self, pick: int, damaged: bool, at: int) -> None:
        write = self.simulation.memory.in_flight[pick % len(self.simulation.memory.in_flight)]
        if damaged:
            write.flips.add(write.landed + at % (len(write.tokens) * self.simulation.memory.token_bytes))
        self.simulation.complete(write)

    @precondition(lambda self: self.simulation.memory.in_flight)
    @rule(pick=PICK, luck=st.integers(0, 9))
    def fail_write(self, pick: int, luck: int) -> None:
        in_flight = self.simulation.memory.in_flight
        self.simulation.fail(in_flight[pick % len(in_flight)], retryable=luck > 0)

    @rule(name=st.sampled_from(TRANSPORTS))
    def break_transport(self, name: str) -> None:
        faults.break_transport(self.simulation, name)

    @rule(name=st.sampled_from(TRANSPORTS), here=st.booleans())
    def lose_transport(self, name: str, here: bool) -> None:
        if faults.may_lose(self.simulation, name):
            (faults.lose_transport if here else faults.lose_encoders_transport)(self.simulation, name)

    @precondition(lambda self: self.simulation.memory.revoking)
    @rule(pick=PICK)
    def revoke(self, pick: int) -> None:
        self.simulation.revoke(pick % len(self.simulation.memory.revoking))

    # The language worker

    @rule(pick=PICK)
    def verify(self, pick: int) -> None:
        if busy := [end for end in self.simulation.living_receivers() if end.checks]:
            end = busy[pick % len(busy)]
            self.simulation.verify(end, pick % len(end.checks))

    @rule(pick=PICK)
    def consume(self, pick: int) -> None:
        if busy := [end for end in self.simulation.living_receivers() if end.queue]:
            end = busy[pick % len(busy)]
            self.simulation.consume(end, pick % len(end.queue))

    # Time

    @rule(seconds=st.sampled_from((0.0, 0.0, 0.1, 0.1, 0.3, 1.0, 2.5, 11.0, 31.0)))
    def wait(self, seconds: float) -> None:
        """Advances the time by ``seconds``; 0: until the next timer."""
        self.simulation.tick(seconds or max(next_wake(self.simulation) - self.simulation.now, 0.001))

    @rule(events=st.integers(1, 30))
    def run_without_faults(self, events: int) -> None:
        """Plays a few events without faults, so that transfers progress beyond their start."""
        for _ in range(events):
            advance_without_faults(self.simulation)

    def teardown(self) -> None:
        quiesce(self.simulation)

    # Choices

    def content(self, total: int) -> Content:
        self.next_content += 1
        return Content(self.next_content, total)

    def encoder(self, pick: int) -> EncodeEnd | None:
        ends = self.simulation.living_encoders()
        return ends[pick % len(ends)] if ends else None

    def receiver(self, pick: int) -> LanguageEnd | None:
        ends = self.simulation.living_receivers()
        return ends[pick % len(ends)] if ends else None
