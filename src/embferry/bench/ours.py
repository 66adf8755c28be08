"""Our own transports, through the library as its users use it. Everything of it that can be set is passed here."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embferry import (
    Checksums,
    EmbeddingReceiver,
    EmbeddingSender,
    Fields,
    GatherSink,
    ReceiveManager,
    SendManager,
    wait,
)
from embferry.memory.blocks import MetadataAllocation, blocks_needed
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transports.contract import Transport

from .contract import Bytes, Facts, Job, Link, Receiving, Sending
from .payloads import LAYOUT

PACKAGE = "embferry.disaggregation"
TRANSPORTS = {
    "shm": "ShmTransport",
    "tcp": "TcpTransport",
    "http": "HttpTransport",
    "mooncake": "MooncakeTransport",
    "nixl": "NixlTransport",
}
"""The class of each, in ``embferry.disaggregation.<transport>.conn_multimodal``."""

MODES: dict[str, dict[str, Any]] = {
    "verified": {},
    "ahead": {},
    "unverified": {"verify": False},
}
"""What each asks of :class:`TransferSettings`. ``ahead``: the checksums are taken before the clock starts."""

MAPPED_TWICE = ("mooncake",)
"""Transports whose engine has a second mapping of the pool: the kernel counts its pages twice as resident."""
BLOCK_TOKENS = 16
PARTS_IN_POOL = 4
"""When an embedding comes in parts that are granted by hand, so many find room at once."""


def missing(options: Facts) -> str | None:
    """What this version lacks for a contestant of ours; None: nothing."""
    transport = options["transport"]
    if importlib.util.find_spec(f"{PACKAGE}.{transport}") is None:
        return f"this version has no transport {transport}"
    return None


def settings(options: Facts) -> TransferSettings:
    return TransferSettings(**MODES[options["mode"]])


def transport(transport: str) -> Transport:
    module = importlib.import_module(f"{PACKAGE}.{transport}.conn_multimodal")
    made: Transport = getattr(module, TRANSPORTS[transport])()
    return made


def rows(source: Bytes, tokens: int) -> Fields:
    """The fields of the embedding whose bytes are ``source``, one after another, as our library takes them."""
    found, at = {}, 0
    for field in LAYOUT.fields:
        size = tokens * field.token_bytes
        found[field.name] = source[at : at + size].reshape(tokens, field.token_bytes)
        at += size
    return found


def touched(tokens: int) -> dict[str, Bytes]:
    """Where an embedding is gathered: arrays that are there already, as the others' are."""
    return {f.name: np.zeros((tokens, f.token_bytes), np.uint8) + np.uint8(1) for f in LAYOUT.fields}


def sink_into(arrays: dict[str, Bytes]) -> GatherSink:
    return GatherSink(make=lambda tokens: arrays)


def geometry(options: Facts, tokens: int) -> Geometry:
    """The pool: ``pool_tokens`` in blocks of ``block_tokens``; by default the embedding fits exactly."""
    block = options.get("block_tokens", BLOCK_TOKENS)
    pool = options.get("pool_tokens", tokens)
    if options.get("transfers"):
        pool = part_blocks(options, tokens) * min(options["transfers"], PARTS_IN_POOL) * block
    return Geometry(LAYOUT, blocks_needed(pool, block), block)


def part_blocks(options: Facts, tokens: int) -> int:
    """Blocks of each part of an embedding that is granted by hand, in so many parts."""
    return blocks_needed(-(-tokens // options["transfers"]), options.get("block_tokens", BLOCK_TOKENS))


def send_manager(options: Facts) -> SendManager:
    return SendManager(LAYOUT, [transport(options["transport"])], settings=settings(options))


def receive_manager(options: Facts, tokens: int) -> ReceiveManager:
    made = transport(options["transport"])
    return ReceiveManager(geometry(options, tokens), [made], settings=settings(options))


def hold_pool(manager: ReceiveManager) -> Callable[[], None]:
    """Takes all blocks, so that nobody is granted any; answers what gives them back, to whoever waits."""
    with manager.lock:
        held = manager.allocator.alloc_blocks(manager.allocator.available, "held")
    assert held is not None  # as many as are free can be had

    def give_back() -> None:
        with manager.lock:
            manager.allocator.free(held.blocks, "held")
        manager.wake()

    return give_back


def draw_room() -> int:
    return secrets.randbits(62) + 1


def until(receiver: EmbeddingReceiver, holds: Callable[[], bool], timeout_s: float) -> None:
    """Waits until a change of the receiver makes ``holds`` true.

    :raises TimeoutError: it did not in time."""
    changed = threading.Event()
    receiver.on_change(changed.set)
    deadline = time.monotonic() + timeout_s
    while not holds():
        if not changed.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"room {receiver.room}: {receiver.poll().name} after {timeout_s:g} s")
        changed.clear()


def until_known(receiver: EmbeddingReceiver, timeout_s: float) -> None:
    """Waits until the sender's announcement is here."""
    until(receiver, lambda: receiver.poll() is not KVPoll.Bootstrapping, timeout_s)


class OursSending(Sending):
    """Options: ``early`` false: nothing is said before the embedding is ready."""

    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._job, self._link = source, job, link
        self._ahead = job.options["mode"] == "ahead"
        self._early = job.options.get("early", True)
        self._checksums: Checksums | None = None
        self._rows = rows(source, job.tokens)
        self.manager = send_manager(job.options)

    def address(self) -> Facts:
        return {"endpoint": self.manager.endpoint}

    def stage(self, number: int) -> Facts:
        self._room = draw_room()
        if self._early:
            self._open()
        if self._ahead:
            self._checksums = Checksums(LAYOUT, self.manager.settings.chunk_bytes)
            self._checksums.take(self._rows, self._job.tokens)
        return {"room": self._room}

    def send(self) -> None:
        if not self._early:
            self._open()
        self._sender.send_embedding(self._rows, checksums=self._checksums)
        if not self._early:
            self._link.tell()

    def finish(self) -> Facts:
        wait(self._sender, self._job.timeout_s)
        self.moved += self._sender.sent_bytes
        self._sender.clear()
        return {}

    def close(self) -> None:
        self.manager.close()

    def _open(self) -> None:
        self._sender: EmbeddingSender = self.manager.open(self._room)
        # Equal digests promise equal bytes: the room's number stands for content that differs in each round.
        self._sender.init(self._job.tokens, self._room.to_bytes(8))


class OursReceiving(Receiving):
    """Options: ``in_place``: use the embedding where it lies; ``transfers``: grant so many by hand."""

    def __init__(self, job: Job, link: Link) -> None:
        self._job, self._link = job, link
        self._early = job.options.get("early", True)
        self.manager = receive_manager(job.options, job.tokens)
        self._arrays = {} if job.options.get("in_place") else touched(job.tokens)
        self.pool_bytes = self.manager.geometry.region_bytes
        self.counted_twice = self.pool_bytes if job.options["transport"] in MAPPED_TWICE else 0

    def connect(self, other: Facts) -> None:
        self._endpoint = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        self._room = staged["room"]
        if self._early:
            self._open()
            until_known(self._receiver, self._job.timeout_s)
        if self._job.options.get("transfers"):
            self._grant()

    def receive(self) -> None:
        if not self._early:
            self._link.wait()
            self._open()
        if self._job.options.get("transfers"):
            until(self._receiver, self._grant, self._job.timeout_s)
        wait(self._receiver, self._job.timeout_s)

    def arrays(self) -> list[Bytes]:
        return list(self._receiver.arrays().values())

    def finish(self) -> Facts:
        transfers = self._receiver.transfers
        in_place = isinstance(self._receiver.sink, GatherSink) and self._receiver.sink.in_place
        self._receiver.clear()
        return {"transfers": transfers, "in_place": in_place}

    def close(self) -> None:
        self.manager.close()

    def _open(self) -> None:
        sink = sink_into(self._arrays) if self._arrays else GatherSink(in_place=True)
        self._receiver = self.manager.open(self._room, self._endpoint, sink)
        self._granted = 0
        first = self._part() if self._job.options.get("transfers") else None
        self._receiver.init(first)
        if first is not None:
            self._granted = first.allocated_tokens

    def _part(self) -> MetadataAllocation | None:
        with self.manager.lock:
            blocks = part_blocks(self._job.options, self._job.tokens)
            return self.manager.allocator.alloc_blocks(blocks, self._room)

    def _grant(self) -> bool:
        """Grants one part after another as long as there is room; whether all are granted."""
        while self._granted < self._job.tokens and self._receiver.needs_resume:
            part = self._part()
            if part is None:
                break
            self._granted += self._receiver.resume_transfer(part, self._granted)
        return self._granted >= self._job.tokens
