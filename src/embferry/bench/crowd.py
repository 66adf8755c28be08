"""Many transfers of ours at once: equals beside each other, and small ones behind a large one."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from embferry import EmbeddingReceiver, EmbeddingSender, wait
from embferry.protocol.states import KVPoll

from . import ours
from .contract import Bytes, Facts, Job, Link, Receiving, Sending
from .payloads import SMALL

UNLOADED = 40
"""Small transfers alone, before the large one begins."""
MOST_BEHIND = 200


class CrowdSending(Sending):
    """Sends the same embedding to ``count`` rooms at once."""

    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._job, self._link = source, job, link
        self._rows = ours.rows(source, job.tokens)
        self._manager = ours.send_manager(job.options)

    def address(self) -> Facts:
        return {"endpoint": self._manager.endpoint}

    def stage(self, number: int) -> Facts:
        rooms = [ours.draw_room() for _ in range(self._job.options["count"])]
        self._senders = [self._manager.open(room) for room in rooms]
        for sender in self._senders:
            sender.init(self._job.tokens, sender.room.to_bytes(8))
        return {"rooms": rooms}

    def send(self) -> None:
        for sender in self._senders:
            sender.send_embedding(self._rows)
        self._link.tell()

    def finish(self) -> Facts:
        for sender in self._senders:
            wait(sender, self._job.timeout_s)
            self.moved += sender.sent_bytes
            sender.clear()
        return {}

    def close(self) -> None:
        self._manager.close()


class CrowdReceiving(Receiving):
    """Notes when each of them may be used. The pool is given out when all wait for it: that makes them equals."""

    def __init__(self, job: Job, link: Link) -> None:
        self._job, self._link = job, link
        self._manager = ours.receive_manager(job.options, job.tokens)
        self.pool_bytes = self._manager.geometry.region_bytes
        self._arrays = [ours.touched(job.tokens) for _ in range(job.options["count"])]

    def connect(self, other: Facts) -> None:
        self._endpoint = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        sinks = [ours.sink_into(arrays) for arrays in self._arrays]
        rooms = zip(staged["rooms"], sinks, strict=True)
        self._receivers = [self._manager.open(room, self._endpoint, sink) for room, sink in rooms]
        self._ready: dict[int, int] = {}
        self._pool = ours.hold_pool(self._manager)
        for receiver in self._receivers:
            receiver.on_change(partial(self._note, receiver))
            receiver.init()
        for receiver in self._receivers:
            ours.until_known(receiver, self._job.timeout_s)

    def receive(self) -> None:
        self._link.wait()
        self._pool()
        for receiver in self._receivers:
            wait(receiver, self._job.timeout_s)

    def arrays(self) -> list[Bytes]:
        return list(self._receivers[0].arrays().values())

    def each(self) -> list[list[Bytes]]:
        return [list(receiver.arrays().values()) for receiver in self._receivers]

    def finish(self) -> Facts:
        for receiver in self._receivers:
            receiver.clear()
        return {"ready": [self._ready[receiver.room] for receiver in self._receivers]}

    def close(self) -> None:
        self._manager.close()

    def _note(self, receiver: EmbeddingReceiver) -> None:
        if receiver.poll() is KVPoll.Success:
            self._ready.setdefault(receiver.room, time.monotonic_ns())


class BehindSending(Sending):
    """First small ones alone, each after the other; then the same behind a large one, until that one is through."""

    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._job, self._link = source, job, link
        self._rows = ours.rows(source, job.tokens)
        self._small_rows = {name: array[: SMALL.tokens] for name, array in self._rows.items()}
        self._manager = ours.send_manager(job.options)

    def address(self) -> Facts:
        return {"endpoint": self._manager.endpoint}

    def stage(self, number: int) -> Facts:
        self._room = ours.draw_room()
        self._began: list[int] = []
        self._senders: list[EmbeddingSender] = []
        return {"room": self._room}

    def send(self) -> None:
        for _ in range(UNLOADED):
            self._send_small()
        large = self._open(self._room, self._job.tokens, b"l")
        self._large_began = time.monotonic_ns()
        large.send_embedding(self._rows)
        while large.poll() is not KVPoll.Success and len(self._began) < UNLOADED + MOST_BEHIND:
            self._send_small()
        self._link.tell(b"e")

    def finish(self) -> Facts:
        for sender in self._senders:
            wait(sender, self._job.timeout_s)
            self.moved += sender.sent_bytes
            sender.clear()
        return {"small_began": self._began, "large_began": self._large_began, "unloaded": UNLOADED}

    def close(self) -> None:
        self._manager.close()

    def _send_small(self) -> None:
        sender = self._open(self._room + 1 + len(self._began), SMALL.tokens, b"s")
        self._began.append(time.monotonic_ns())
        sender.send_embedding(self._small_rows)
        self._link.wait()

    def _open(self, room: int, tokens: int, word: bytes) -> EmbeddingSender:
        """Opens a room on both sides; the request is known to both when it returns."""
        sender = self._manager.open(room)
        self._senders.append(sender)
        sender.init(tokens, room.to_bytes(8))
        self._link.tell(word)
        self._link.wait()
        return sender


class BehindReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._job, self._link = job, link
        self._manager = ours.receive_manager(job.options, job.tokens)
        self.pool_bytes = self._manager.geometry.region_bytes
        self._arrays = ours.touched(job.tokens)

    def connect(self, other: Facts) -> None:
        self._endpoint = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        self._room = staged["room"]
        self._large_ready = 0
        self._ready: list[int] = []
        self._small: list[EmbeddingReceiver] = []

    def receive(self) -> None:
        while (word := self._link.wait()) != b"e":
            if word == b"l":
                self._large = self._manager.open(self._room, self._endpoint, ours.sink_into(self._arrays))
                self._large.on_change(self._note)
                self._begin(self._large)
            else:
                small = self._manager.open(self._room + 1 + len(self._small), self._endpoint)
                self._small.append(small)
                self._begin(small)
                wait(small, self._job.timeout_s)
                self._ready.append(time.monotonic_ns())
                self._link.tell()
        wait(self._large, self._job.timeout_s)

    def arrays(self) -> list[Bytes]:
        return list(self._large.arrays().values())

    def finish(self) -> Facts:
        large = self._large.arrays()
        for small in self._small:
            if not all(np.array_equal(array, large[name][: SMALL.tokens]) for name, array in small.arrays().items()):
                raise ValueError(f"room {small.room}: the bytes are not those that were sent")
            small.clear()
        self._large.clear()
        return {"small_ready": self._ready, "large_ready": self._large_ready}

    def close(self) -> None:
        self._manager.close()

    def _begin(self, receiver: EmbeddingReceiver) -> None:
        receiver.init()
        ours.until_known(receiver, self._job.timeout_s)
        self._link.tell()

    def _note(self) -> None:
        if self._large.poll() is KVPoll.Success and not self._large_ready:
            self._large_ready = time.monotonic_ns()
