"""One end of a soak, as a process: ``end.py sending|receiving TRANSPORT SEED RELAY_PORT``.

Prints where it listens, as JSON. Each line of its input asks for rooms: ``[first, count, endpoint]``; it answers each
with a line that says how they ended. It ends with its input.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from embferry import ChunkSink, Fields, GatherSink, ReceiveManager, SendManager, ShmTransport, TcpTransport
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transfer.handle import Handle
from embferry.transfer.receive_handle import EmbeddingReceiver
from embferry.transports.contract import Region, Transport
from embferry.transports.tcp.transport import TcpHandle
from tests.transfer.soak.rooms import GEOMETRY, LAYOUT, Room, all_content

AT_ONCE = 12
"""Rooms at the same time: more than the pool can grant the blocks that they want."""
STUCK_SECONDS = 120.0
"""Without the end of a room: the soak hangs."""
LOOK_SECONDS = 0.05
"""Between two looks at a room of which nothing was heard."""
SETTINGS = TransferSettings(linger=1.0, lease_timeout=10.0, chunk_bytes=256 << 10)

Job = Iterator[bool]
"""The life of one room at one end. Yields whether it can go on at once; otherwise it waits for a change."""


class RelayedTcp(TcpTransport):
    """The tcp transport of a receiver that senders reach through a relay."""

    relay = port = 0

    def register(self, region: Region) -> bytes:
        handle = msgspec.msgpack.decode(super().register(region), type=TcpHandle)
        self.port = handle.port
        return msgspec.msgpack.encode(msgspec.structs.replace(handle, port=self.relay))


class End:
    """The rooms of one end, and how they ended.

    Attributes:
        outcomes: How often a room with this plan ended in this way.
        refused: Allocations that the pool has refused.
        wrong: What is not as it must be, one sentence each.
    """

    def __init__(self, seed: int) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.refused, self.wrong = 0, list[str]()
        self._seed, self._content = seed, all_content()
        self._changed = threading.Event()

    def run(self, first: int, count: int, job: Callable[[Room], Job]) -> None:
        """Runs the rooms from ``first`` on, AT_ONCE at a time."""
        numbers, jobs = iter(range(first, first + count)), dict[int, Job]()
        heard = time.monotonic()
        while True:
            self._changed.clear()
            while len(jobs) < AT_ONCE and (number := next(numbers, None)) is not None:
                jobs[number] = job(Room.drawn(self._seed, number))
            if not jobs:
                return
            steps = {number: next(going, None) for number, going in jobs.items()}
            for number in [number for number, step in steps.items() if step is None]:
                del jobs[number]
                heard = time.monotonic()
            if time.monotonic() - heard > STUCK_SECONDS:
                raise TimeoutError(f"no room has ended for {STUCK_SECONDS:g} s: {[*jobs]}")
            if not any(step is not False for step in steps.values()):
                self._changed.wait(LOOK_SECONDS)

    def ended(self, room: Room, end: Handle) -> None:
        outcome = "delivered"
        if end.poll() is KVPoll.Failed:
            error = end.failure_exception()
            outcome = error.code
            if room.planned == "delivered":
                self.wrong.append(f"room {room.number} of {room.tokens} tokens has failed: {error}")
        self.outcomes[room.planned, outcome] += 1

    def watch(self, end: Handle) -> None:
        end.wake_on_change(self._changed.set)


class Sending(End):
    def __init__(self, seed: int, transport: str, relay: int) -> None:
        super().__init__(seed)
        self.manager = SendManager(LAYOUT, [_transport(transport, relay)], settings=SETTINGS)
        self.told = {"endpoint": self.manager.endpoint}

    def job(self, room: Room, endpoint: str) -> Job:
        fields, aborts = room.content(self._content), room.planned == "sender aborts"
        sender = self.manager.open(room.number)
        self.watch(sender)
        if not aborts or room.at:  # otherwise it aborts before it has announced anything
            sender.init(room.tokens, f"{room.start} {room.tokens}".encode())
            for ready in room.pieces:
                if aborts and ready > room.at:
                    break
                sender.send_embedding(fields, ready)
                yield True
        if aborts:
            sender.abort()
        while not sender.has_ended:
            yield False
        self.ended(room, sender)

    def settle(self) -> None:
        pass


class Receiving(End):
    def __init__(self, seed: int, transport: str, relay: int) -> None:
        super().__init__(seed)
        made = _transport(transport, relay)
        self.manager = ReceiveManager(GEOMETRY, [made], settings=SETTINGS)
        self.told = {"port": getattr(made, "port", 0)}

    def job(self, room: Room, endpoint: str) -> Job:
        sink = ChunkSink() if room.takes == "chunks" else GatherSink(in_place=room.takes == "in place")
        most = room.tokens - 1 if room.planned == "refused" else None
        receiver = self.manager.open(room.number, endpoint, sink, max_tokens=most)
        self.watch(receiver)
        allocated = self._begin(receiver, room)
        fields, came = room.content(self._content), 0
        while not receiver.has_ended:
            came += self._take(sink, fields, room)
            if allocated:
                allocated = not self._leave_to_pool(receiver)
            if room.planned == "receiver aborts" and self._verified(receiver) >= room.at:
                break
            yield False
        came += self._take(sink, fields, room)
        self._compare(receiver, fields, room)
        receiver.abort()
        while not receiver.has_ended:
            yield False
        came += self._take(sink, fields, room)
        if room.takes == "chunks" and receiver.poll() is KVPoll.Success and came != room.tokens:
            self.wrong.append(f"room {room.number}: {came} of {room.tokens} tokens were handed on")
        self.ended(room, receiver)
        receiver.clear()

    def settle(self) -> None:
        """Waits until every block is free."""
        deadline, allocator = time.monotonic() + STUCK_SECONDS, self.manager.allocator
        while True:
            with self.manager.lock:
                if allocator.available == GEOMETRY.num_blocks:
                    return allocator.check_integrity()
            if time.monotonic() > deadline:
                raise TimeoutError(f"blocks are not free: {allocator.holders()}")
            time.sleep(LOOK_SECONDS / 10)

    def _begin(self, receiver: EmbeddingReceiver, room: Room) -> bool:
        """Asks for the embedding. Returns whether this end has allocated the first blocks."""
        allocation = None
        if room.allocates:
            with self.manager.lock:
                allocation = self.manager.allocator.alloc(min(room.tokens, 100), room.number)
            self.refused += allocation is None
        receiver.init(allocation)
        return allocation is not None

    def _leave_to_pool(self, receiver: EmbeddingReceiver) -> bool:
        """Lets the pool grant the rest, once blocks are needed. Returns whether that was so."""
        with self.manager.lock:
            wanted = receiver.machine.wanted(receiver.now())
            if wanted is None or receiver.transfers == 0:
                return False
            receiver.resume_transfer(sent_tokens=wanted[0])
            return True

    def _verified(self, receiver: EmbeddingReceiver) -> int:
        """Returns the tokens that have arrived; a transfer that has failed meanwhile has none."""
        with self.manager.lock:
            return -1 if receiver.error is not None else receiver.transferred_tokens

    def _take(self, sink: ChunkSink | GatherSink, fields: Fields, room: Room) -> int:
        """Takes the chunks that have been handed on, compares them, and returns their tokens."""
        tokens = 0
        while isinstance(sink, ChunkSink) and (chunk := sink.pop()) is not None:
            for name, rows in sink.read(chunk).items():
                if not np.array_equal(rows, fields[name][chunk.offset : chunk.offset + chunk.length]):
                    self.wrong.append(f"room {room.number}: other bytes in {name} of chunk {chunk.chunk_info}")
            chunk.release()
            tokens += chunk.length
        return tokens

    def _compare(self, receiver: EmbeddingReceiver, fields: Fields, room: Room) -> None:
        """Compares every byte that was gathered, also of a transfer that is about to be aborted."""
        try:
            gathered = receiver.buffered_chunks() or {}
        except LocalProtocolError:
            gathered = {}
        if receiver.poll() is KVPoll.Success and room.takes != "chunks" and not gathered:
            self.wrong.append(f"room {room.number}: nothing was gathered")
        for name, rows in gathered.items():
            if not np.array_equal(rows, fields[name][: len(rows)]):
                self.wrong.append(f"room {room.number}: other bytes in {name}")


def _transport(name: str, relay: int) -> Transport:
    if name == "shm":
        return ShmTransport()
    transport = RelayedTcp()
    transport.relay = relay
    return transport


def main(role: str, transport: str, seed: int, relay: int) -> None:
    kind: type[Sending] | type[Receiving] = Sending if role == "sending" else Receiving
    end: Any = kind(seed, transport, relay)
    print(json.dumps(end.told), flush=True)
    for line in sys.stdin:
        first, count, endpoint = json.loads(line)
        end.run(first, count, lambda room, endpoint=endpoint: end.job(room, endpoint))  # type: ignore[misc]
        end.settle()
        outcomes = [[*key, times] for key, times in sorted(end.outcomes.items())]
        print(json.dumps({"outcomes": outcomes, "refused": end.refused, "wrong": end.wrong}), flush=True)
    end.manager.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
