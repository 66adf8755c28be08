"""Embferry's own transports, used through the public API."""

from __future__ import annotations

import secrets
import threading
import time
from functools import partial
from typing import Any

import numpy as np

from embferry import Checksums, EmbeddingReceiver, Fields, GatherSink, ReceiveManager, SendManager, wait
from embferry.memory.blocks import blocks_needed
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transports.registry import TRANSPORTS

from .contract import Bytes, Facts, Job, Link, Receiving, Sending
from .payloads import LAYOUT

MODES: dict[str, dict[str, Any]] = {"verified": {}, "ahead": {}, "unverified": {"verify": False}}
"""Settings of each mode. With ``ahead``, the sender computes checksums before the clock starts."""
MAPPED_TWICE = ("mooncake",)
"""Transports whose engine maps the pool a second time."""
BLOCK_TOKENS = 16


def fields(source: Bytes, tokens: int) -> Fields:
    """Returns the fields of an embedding, uint8 ``[tokens, bytes a token]``, whose bytes follow each other."""
    found, at = {}, 0
    for field in LAYOUT.fields:
        size = tokens * field.token_bytes
        found[field.name] = source[at : at + size].reshape(tokens, field.token_bytes)
        at += size
    return found


def touched(tokens: int) -> dict[str, Bytes]:
    """Returns arrays to gather an embedding into, whose memory has been touched before."""
    return {f.name: np.zeros((tokens, f.token_bytes), np.uint8) + np.uint8(1) for f in LAYOUT.fields}


def _gather_into(arrays: dict[str, Bytes]) -> GatherSink:
    return GatherSink(make=lambda tokens: arrays)


def until_known(receiver: EmbeddingReceiver, timeout_s: float) -> None:
    """Waits until the receiver knows the sender's announcement.

    Raises:
        TimeoutError: it did not come in time.
    """
    changed = threading.Event()
    receiver.on_change(changed.set)
    deadline = time.monotonic() + timeout_s
    while receiver.poll() is KVPoll.Bootstrapping:
        if not changed.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"room {receiver.room}: no announcement after {timeout_s:g} s")
        changed.clear()


def _common(options: Facts) -> dict[str, Any]:
    """Returns the arguments that both managers have in common."""
    transport = TRANSPORTS[options["transport"]].load()()
    return {"transports": [transport], "settings": TransferSettings(**MODES[options["mode"]])}


class EmbferrySending(Sending):
    """Sends the embedding, or several at once.

    Options: ``early=False`` announces only when the embedding is ready. ``rooms`` is a list with a number of tokens for
    each room: it gets that many leading tokens of the embedding.
    """

    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)
        self._early, self._several = job.options.get("early", True), "rooms" in job.options
        self._checksums: Checksums | None = None
        whole = fields(source, job.tokens)
        self._tokens = job.options.get("rooms", [job.tokens])
        self._fields = [{name: array[:tokens] for name, array in whole.items()} for tokens in self._tokens]
        self._manager = SendManager(LAYOUT, **_common(job.options))

    def address(self) -> Facts:
        return {"endpoint": self._manager.endpoint}

    def stage(self, number: int) -> Facts:
        self._rooms = [secrets.randbits(62) + 1 for _ in self._tokens]
        if self._early:
            self._open()
        if self.job.options["mode"] == "ahead":
            self._checksums = Checksums(LAYOUT, self._manager.settings.chunk_bytes)
            self._checksums.take(self._fields[0], self.job.tokens)
        return {"rooms": self._rooms}

    def send(self) -> None:
        if not self._early:
            self._open()
        for sender, content in zip(self._senders, self._fields, strict=True):
            sender.send_embedding(content, checksums=self._checksums)
        if not self._early or self._several:
            self.link.tell()

    def each(self) -> list[list[Bytes]]:
        return [list(content.values()) for content in self._fields]

    def finish(self) -> Facts:
        for sender in self._senders:
            wait(sender, self.job.timeout_s)
            sender.clear()
        return {}

    def close(self) -> None:
        self._manager.close()

    def _open(self) -> None:
        self._senders = [self._manager.open(room) for room in self._rooms]
        for sender, tokens in zip(self._senders, self._tokens, strict=True):
            # Equal digests promise equal bytes. The bytes differ in each round, so the room stands for the digest.
            sender.init(tokens, sender.room.to_bytes(8))


class EmbferryReceiving(Receiving):
    """Receives the embedding, or several at once; with ``in_place`` it is used in the pool, otherwise copied out.

    The pool has ``pool_tokens`` tokens in blocks of ``block_tokens``; by default it holds the embedding exactly.
    With ``rooms``, the pool is held back until all receivers wait for it, so that they start together.
    """

    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._early, self._several = job.options.get("early", True), "rooms" in job.options
        block = job.options.get("block_tokens", BLOCK_TOKENS)
        geometry = Geometry(LAYOUT, blocks_needed(job.options.get("pool_tokens", job.tokens), block), block)
        self._manager = ReceiveManager(geometry, **_common(job.options))
        in_place, rooms = job.options.get("in_place"), job.options.get("rooms", [job.tokens])
        self._arrays = [{} if in_place else touched(tokens) for tokens in rooms]
        self.pool_bytes = self._manager.geometry.region_bytes
        self.counted_twice = self.pool_bytes if job.options["transport"] in MAPPED_TWICE else 0

    def connect(self, other: Facts) -> None:
        self._endpoint = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        self._rooms, self._ready = staged["rooms"], dict[int, int]()
        if self._several:
            self._hold_pool()
        if self._early:
            self._open()
            for receiver in self._receivers:
                until_known(receiver, self.job.timeout_s)

    def receive(self) -> None:
        if not self._early or self._several:
            self.link.wait()
        if not self._early:
            self._open()
        if self._several:
            self._release_pool()
        for receiver in self._receivers:
            wait(receiver, self.job.timeout_s)

    def each(self) -> list[list[Bytes]]:
        return [list(receiver.arrays().values()) for receiver in self._receivers]

    def finish(self) -> Facts:
        facts: Facts = {"transfers": self._receivers[0].transfers}
        if self._several:
            facts["ready"] = [self._ready[receiver.room] for receiver in self._receivers]
        for receiver in self._receivers:
            receiver.clear()
        return facts

    def close(self) -> None:
        self._manager.close()

    def _open(self) -> None:
        sinks = [_gather_into(arrays) if arrays else GatherSink(in_place=True) for arrays in self._arrays]
        rooms = zip(self._rooms, sinks, strict=True)
        self._receivers = [self._manager.open(room, self._endpoint, sink) for room, sink in rooms]
        for receiver in self._receivers:
            if self._several:
                receiver.on_change(partial(self._note, receiver))
            receiver.init()

    def _note(self, receiver: EmbeddingReceiver) -> None:
        """Notes when the embedding may be used. Runs on the manager's thread."""
        if receiver.poll() is KVPoll.Success:
            self._ready.setdefault(receiver.room, time.monotonic_ns())

    def _hold_pool(self) -> None:
        with self._manager.lock:
            held = self._manager.allocator.alloc_blocks(self._manager.allocator.available, "held")
        assert held is not None  # all that are free were asked for
        self._held = held

    def _release_pool(self) -> None:
        with self._manager.lock:
            self._manager.allocator.free(self._held.blocks, "held")
        self._manager.wake()
