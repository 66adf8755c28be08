"""The property: whatever happens, in whatever order, the world's invariants hold, and every story ends."""

from __future__ import annotations

import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from embferry.protocol.errors import Aborted

from .ends import Content, EncodeEnd, LanguageEnd
from .quiescence import calm_event, next_wake, quiesce
from .simulation import LANGUAGE, TRANSPORTS, World

ROOMS = st.integers(0, 2)
PICK = st.integers(0, 1 << 16)  # an index, modulo whatever there is
TOTALS = st.one_of(st.integers(0, 12), st.integers(12, 40))


class Ferry(RuleBasedStateMachine):
    """Rooms, encode workers that come and go, one language worker's pool; every rule is one event."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
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
        self.world = World(
            num_blocks,
            block_size,
            chunk_blocks=chunk_blocks,
            writes_in_flight=writes,
            default_tokens=default,
            progress_rate=progress,
        )
        for room, total in enumerate(totals):
            encoder = self.world.start_encoder(room, self.content(total))
            self.world.start_receiver(room)
            if ready >= 0:
                encoder.produce(ready)
                self.world.run()

    # Both ends come and go

    @rule(
        what=st.sampled_from(
            ("encoder", "receiver", "restarted encoder", "restarted receiver", "spare encoder", "broken link")
        ),
        pick=PICK,
        embedding=st.sampled_from(("same", "same length", "other")),
        total=TOTALS,
    )
    def come(self, what: str, pick: int, embedding: str, total: int) -> None:
        world, receiver, room = self.world, self.receiver(pick), pick % 3
        former = [end for end in world.encoders if end.room == (receiver.room if receiver else room)]
        if former and embedding == "same":
            content = former[-1].content
        else:
            content = self.content(former[-1].content.total if former and embedding == "same length" else total)
        if what == "encoder" and not any(end.room == room for end in world.living_encoders()):
            world.start_encoder(room, content)
        elif what == "receiver" and sum(end.room == room for end in world.living_receivers()) < 2:
            world.start_receiver(room)
        elif what == "restarted encoder" and former:
            world.start_encoder(former[-1].room, content, former[-1].address)
        elif receiver is None:
            return
        elif what == "restarted receiver":
            world.kill_receiver(receiver)
            world.start_receiver(receiver.room, receiver.endpoint)
        elif what == "spare encoder":  # while the first may live
            world.redirect(receiver, world.start_encoder(receiver.room, content, f"spare {world.steps}").address)
        elif what == "broken link":
            world.redirect(receiver, receiver.endpoint)

    @rule(what=st.sampled_from(("killed", "silent", "killed receiver", "abort", "refusal", "clear")), pick=PICK)
    def go(self, what: str, pick: int) -> None:
        world, encoder, receiver = self.world, self.encoder(pick), self.receiver(pick)
        if encoder and what in ("killed", "silent"):
            world.kill_encoder(encoder, silent=what == "silent")
        elif encoder and what == "refusal":
            encoder.machine.abort(Aborted("asked for", room=encoder.room), world.now)
        elif receiver and what == "killed receiver":
            world.kill_receiver(receiver)
        elif receiver and what == "abort":
            receiver.machine.abort(Aborted("asked for", room=receiver.room), world.now)
        elif receiver and what == "clear":
            receiver.queue.clear()
            receiver.machine.clear(world.now)
        world.run()

    # The encoder works

    @rule(pick=PICK, more=st.one_of(st.integers(0, 8), st.just(1 << 10)))
    def produce(self, pick: int, more: int) -> None:
        if end := self.encoder(pick):
            end.produce(end.machine.ready_tokens + more)
            self.world.run()

    # Messages

    @precondition(lambda self: self.world.network.packets)
    @rule(pick=PICK)
    def deliver(self, pick: int) -> None:
        self.world.deliver(pick % len(self.world.network.packets))

    @precondition(lambda self: self.world.network.packets)
    @rule(count=st.integers(1, 6))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.world.network.packets))):
            self.world.deliver(0)

    @precondition(lambda self: self.world.network.packets)
    @rule(pick=PICK)
    def duplicate(self, pick: int) -> None:
        self.world.network.duplicate(pick % len(self.world.network.packets))

    @precondition(lambda self: self.world.network.packets)
    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        self.world.network.lose(pick % len(self.world.network.packets))

    @rule(room=ROOMS)
    def partition_or_heal(self, room: int) -> None:
        if self.world.network.cut:
            self.world.network.heal()
        else:
            self.world.network.partition(LANGUAGE, f"encode {room}")

    # Writes

    @precondition(lambda self: self.world.memory.flights)
    @rule(pick=PICK, count=st.integers(1, 24))
    def land(self, pick: int, count: int) -> None:
        flights = self.world.memory.flights
        self.world.land(flights[pick % len(flights)], count)

    @precondition(lambda self: self.world.memory.flights)
    @rule(pick=PICK, damaged=st.sampled_from((False, False, True)), at=PICK)
    def complete(self, pick: int, damaged: bool, at: int) -> None:
        flight = self.world.memory.flights[pick % len(self.world.memory.flights)]
        if damaged:
            flight.flips.add(flight.landed + at % (len(flight.tokens) * self.world.memory.token_bytes))
        self.world.complete(flight)

    @precondition(lambda self: self.world.memory.flights)
    @rule(pick=PICK, luck=st.integers(0, 9))
    def fail_write(self, pick: int, luck: int) -> None:
        flights = self.world.memory.flights
        self.world.fail(flights[pick % len(flights)], retryable=luck > 0)

    @rule(name=st.sampled_from(TRANSPORTS))
    def break_transport(self, name: str) -> None:
        self.world.break_transport(name)

    @precondition(lambda self: self.world.memory.revoking)
    @rule(pick=PICK)
    def revoke(self, pick: int) -> None:
        self.world.revoke(pick % len(self.world.memory.revoking))

    # The language worker works

    @rule(pick=PICK)
    def verify(self, pick: int) -> None:
        if busy := [end for end in self.world.living_receivers() if end.checks]:
            end = busy[pick % len(busy)]
            self.world.verify(end, pick % len(end.checks))

    @rule(pick=PICK)
    def consume(self, pick: int) -> None:
        if busy := [end for end in self.world.living_receivers() if end.queue]:
            end = busy[pick % len(busy)]
            self.world.consume(end, pick % len(end.queue))

    # Time

    @rule(seconds=st.sampled_from((0.0, 0.0, 0.1, 0.1, 0.3, 1.0, 2.5, 11.0, 31.0)))
    def wait(self, seconds: float) -> None:
        """So long, or for whatever is due next."""
        self.world.tick(seconds or max(next_wake(self.world) - self.world.now, 0.001))

    @rule(events=st.integers(1, 30))
    def calm(self, events: int) -> None:
        """For a while nothing goes wrong: otherwise nobody would come far."""
        for _ in range(events):
            calm_event(self.world)

    def teardown(self) -> None:
        quiesce(self.world)

    # Who is meant

    def content(self, total: int) -> Content:
        self.next_content += 1
        return Content(self.next_content, total)

    def encoder(self, pick: int) -> EncodeEnd | None:
        ends = self.world.living_encoders()
        return ends[pick % len(ends)] if ends else None

    def receiver(self, pick: int) -> LanguageEnd | None:
        ends = self.world.living_receivers()
        return ends[pick % len(ends)] if ends else None
