"""Embferry's own transports, used through the public API.

Options: ``transport`` and ``mode`` (:data:`MODES`). With ``in_place``, the embedding is used in the pool, otherwise
copied out. The pool has ``pool_tokens`` tokens in blocks of ``block_tokens``; by default it holds the embedding.
``early=False`` announces only when the embedding is ready. ``trust`` is what both ends share (:data:`.trust.TRUSTS`).
With ``fresh``, each round has a new receiver, so that a transfer begins with connecting. ``rooms`` is a list with a
number of tokens for each room, which gets that many leading tokens of the embedding; the pool is held back until all
receivers wait for it, so that they start together.
"""

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

from .contract import Bytes, End, Facts, Job, Receiving, Sending
from .payloads import LAYOUT
from .trust import share

MODES: dict[str, dict[str, Any]] = {"verified": {}, "ahead": {}, "unverified": {"verify": False}}
"""Settings of each mode. With ``ahead``, the sender computes checksums before the clock starts."""
MAPPED_TWICE = ("mooncake",)
"""Transports whose engine maps the pool a second time."""
BLOCK_TOKENS = 16


def common(job: Job) -> dict[str, Any]:
    """Returns the arguments that the managers of both ends have in common."""
    options = job.options
    share(options.get("trust", ""), job.folder)
    settings = TransferSettings(**MODES[options["mode"]] | options.get("settings", {}))
    return {"transports": [TRANSPORTS[options["transport"]].load()()], "settings": settings}


def leading(tensor: Bytes, total: int, tokens: int) -> dict[str, Bytes]:
    """Returns the fields of the first ``tokens`` tokens of an embedding of ``total`` tokens.

    In ``tensor``, the bytes of all tokens of a field follow each other.
    """
    found, at = {}, 0
    for field in LAYOUT.fields:
        whole = tensor[at : (at := at + total * field.token_bytes)]
        found[field.name] = whole.reshape(total, field.token_bytes)[:tokens]
    return found


def destination(tokens: int) -> dict[str, Bytes]:
    """Returns arrays to gather an embedding into, whose memory has been touched before."""
    return {field.name: np.full((tokens, field.token_bytes), 1, np.uint8) for field in LAYOUT.fields}


def into(arrays: dict[str, Bytes]) -> GatherSink:
    return GatherSink(make=lambda tokens: arrays)


def digest_of(room: int) -> bytes:
    """Returns a content digest. Equal ones promise equal bytes; the bytes differ in each round, and so do the rooms."""
    return room.to_bytes(8)


def wait_until_announced(receiver: EmbeddingReceiver, timeout_s: float) -> None:
    """Waits for the offer.

    Raises:
        TimeoutError: It has not come in time.
    """
    changed, deadline = threading.Event(), time.monotonic() + timeout_s
    stop_waking = receiver.wake_on_change(changed.set)
    while receiver.poll() is KVPoll.Bootstrapping:
        if not changed.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"room {receiver.room}: no announcement after {timeout_s:g} s")
        changed.clear()
    stop_waking()


class _Embferry(End):
    def common(self) -> dict[str, Any]:
        """Notes what both ends must know, and returns the arguments that both managers have in common."""
        options = self.job.options
        self._early, self._several = options.get("early", True), "rooms" in options
        self._tokens: list[int] = options.get("rooms", [self.job.tokens])
        return common(self.job)


class EmbferrySending(_Embferry, Sending):
    """Sends the embedding, or several at once."""

    def setup(self) -> None:
        self._checksums: Checksums | None = None
        self._manager = SendManager(LAYOUT, **self.common())
        self.closing.callback(self._manager.close)
        self._fields: list[Fields] = [leading(self.tensor, self.job.tokens, tokens) for tokens in self._tokens]

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

    def _open(self) -> None:
        self._senders = [self._manager.open(room) for room in self._rooms]
        for sender, tokens in zip(self._senders, self._tokens, strict=True):
            sender.init(tokens, digest_of(sender.room))


class EmbferryReceiving(_Embferry, Receiving):
    """Receives the embedding, or several at once."""

    def setup(self) -> None:
        options, self._common = self.job.options, self.common()
        block = options.get("block_tokens", BLOCK_TOKENS)
        self._geometry = Geometry(LAYOUT, blocks_needed(options.get("pool_tokens", self.job.tokens), block), block)
        self._manager = ReceiveManager(self._geometry, **self._common)
        self.closing.callback(lambda: self._manager.close())
        self.counted_twice = self._geometry.region_bytes if options["transport"] in MAPPED_TWICE else 0
        self._arrays: list[dict[str, Bytes]] = []
        if not options.get("in_place"):
            self._arrays = [destination(tokens) for tokens in self._tokens]

    def connect(self, other: Facts) -> None:
        self._endpoint = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        self._rooms, self._ready = staged["rooms"], dict[int, int]()
        if self._several:  # hold the pool
            with self._manager.lock:
                held = self._manager.allocator.alloc_blocks(self._manager.allocator.available, "held")
            assert held is not None  # all that are free were asked for
            self._held = held
        if self._early:
            self._open()
            for receiver in self._receivers:
                wait_until_announced(receiver, self.job.timeout_s)

    def receive(self) -> None:
        if not self._early or self._several:
            self.link.wait()
        if not self._early:
            self._open()
        if self._several:
            with self._manager.lock:
                self._manager.allocator.free(self._held.blocks, "held")
            self._manager.wake()
        for receiver in self._receivers:
            wait(receiver, self.job.timeout_s)

    def each(self) -> list[list[Bytes]]:
        return [list(receiver.arrays().values()) for receiver in self._receivers]

    def finish(self) -> Facts:
        facts: Facts = {"transfers": self._receivers[0].transfers}
        if self._several:
            facts["ends"] = [self._ready[receiver.room] for receiver in self._receivers]
        for receiver in self._receivers:
            receiver.clear()
        if self.job.options.get("fresh"):
            self._manager.close()
            self._manager = ReceiveManager(self._geometry, **self.common())
        return facts

    def _open(self) -> None:
        sinks = [into(arrays) for arrays in self._arrays] or [GatherSink(in_place=True) for _ in self._rooms]
        rooms = zip(self._rooms, sinks, strict=True)
        self._receivers = [self._manager.open(room, self._endpoint, sink) for room, sink in rooms]
        for receiver in self._receivers:
            if self._several:
                receiver.wake_on_change(partial(self._note, receiver))
            receiver.init()

    def _note(self, receiver: EmbeddingReceiver) -> None:
        """Notes when the embedding may be used. Runs on the manager's thread."""
        if receiver.poll() is KVPoll.Success:
            self._ready.setdefault(receiver.room, time.monotonic_ns())
