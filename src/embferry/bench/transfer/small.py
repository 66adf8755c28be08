"""Many transfers in one round, through embferry's public API: what a transfer costs beyond its bytes.

``OneByOne``: each begins when the last has ended, and is announced early. ``AtOnce``: so many are open all the time,
each announced when its embedding is ready. Options, beside those of :mod:`.library`:

- ``count``: transfers a round; each has ``tokens`` tokens, the first ones of the embedding.
- ``at_once``: how many ``AtOnce`` keeps open.
- ``open``: rooms that are open at both ends, announced, and idle all the time (``OneByOne``).
- ``large``: the whole embedding is under way as well (``OneByOne``). Only small ones that begin before it ends count.

The bytes of one transfer of each round are compared.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from embferry import EmbeddingReceiver, EmbeddingSender, GatherSink, ReceiveManager, SendManager, wait
from embferry.memory.blocks import blocks_needed
from embferry.protocol.layout import Geometry

from .contract import Bytes, Facts, Receiving, Sending
from .library import BLOCK_TOKENS, common, destination, digest_of, into, leading, wait_until_announced
from .payloads import LAYOUT

WARM_UP = 5
"""Transfers at the beginning of a round whose times do not count, because the processes were stopped before it."""
OPENED_AT_ONCE = 256
"""Idle rooms that are opened together: few enough that no message waits long."""

H = TypeVar("H", EmbeddingSender, EmbeddingReceiver)


class _SmallSending(Sending):
    def setup(self) -> None:
        self._manager = SendManager(LAYOUT, **common(self.job))
        self.closing.callback(self._manager.close)
        self._tokens: int = self.job.options["tokens"]
        self._fields = leading(self.tensor, self.job.tokens, self._tokens)

    def address(self) -> Facts:
        return {"endpoint": self._manager.endpoint}

    def stage(self, number: int) -> Facts:
        self._rooms = _draw(self.job.options["count"])
        return {"rooms": self._rooms}

    def each(self) -> list[list[Bytes]]:
        return [list(self._fields.values())]

    def announce(self, room: int, tokens: int) -> EmbeddingSender:
        sender = self._manager.open(room)
        sender.init(tokens, digest_of(room))
        return sender


class _SmallReceiving(Receiving):
    def setup(self) -> None:
        options = self.job.options
        self._tokens: int = options["tokens"]
        block: int = options.get("block_tokens", BLOCK_TOKENS)
        geometry = Geometry(LAYOUT, blocks_needed(options["pool_tokens"], block), block)
        self._last: EmbeddingReceiver
        self._manager = ReceiveManager(geometry, **common(self.job))
        self.closing.callback(self._manager.close)

    def connect(self, other: Facts) -> None:
        self._endpoint: str = other["endpoint"]

    def arm(self, number: int, staged: Facts) -> None:
        self._rooms: list[int] = staged["rooms"]

    def each(self) -> list[list[Bytes]]:
        return [list(self._last.arrays().values())]

    def finish(self) -> Facts:
        self._last.clear()
        return {}

    def ask(self, room: int, sink: GatherSink) -> EmbeddingReceiver:
        receiver = self._manager.open(room, self._endpoint, sink)
        receiver.init()
        return receiver


class OneByOneSending(_SmallSending):
    def stage(self, number: int) -> Facts:
        options, idle = self.job.options, list[int]()
        if not number:
            idle = _draw(options.get("open", 0))
            self._idle = [self.announce(room, self._tokens) for room in idle]
        self._large: EmbeddingSender | None = None
        if options.get("large"):
            (room,) = _draw(1)
            self._large = self.announce(room, self.job.tokens)
        return super().stage(number) | {"idle": idle, "large": [self._large.room] if self._large else []}

    def send(self) -> None:
        self._starts = list[int]()
        for number, room in enumerate(self._rooms):
            if number == WARM_UP and self._large is not None:
                self._large.send_embedding(leading(self.tensor, self.job.tokens, self.job.tokens))
            sender = self.announce(room, self._tokens)
            self.link.tell()
            self.link.wait()
            self._starts.append(time.monotonic_ns())
            sender.send_embedding(self._fields)
            wait(sender, self.job.timeout_s)
            sender.clear()

    def finish(self) -> Facts:
        if self._large is not None:
            wait(self._large, self.job.timeout_s)
            self._large.clear()
        return {"starts": self._starts[WARM_UP:]}


class OneByOneReceiving(_SmallReceiving):
    def setup(self) -> None:
        super().setup()
        options = self.job.options
        self._idle = list[EmbeddingReceiver]()
        self._small = {} if options.get("in_place") else destination(self._tokens)
        self._whole = destination(self.job.tokens) if options.get("large") else {}

    def arm(self, number: int, staged: Facts) -> None:
        super().arm(number, staged)
        for start in range(0, len(staged["idle"]), OPENED_AT_ONCE):
            rooms = staged["idle"][start : start + OPENED_AT_ONCE]
            self._open_and_wait(self._idle, rooms)
        self._large, self._large_ended = list[EmbeddingReceiver](), 0
        self._open_and_wait(self._large, staged["large"])
        for receiver in self._large:
            receiver.wake_on_change(self._note)

    def receive(self) -> None:
        self._began, self._ready = list[int](), list[int]()
        for number, room in enumerate(self._rooms):
            self.link.wait()
            receiver = self.ask(room, self._sink())
            wait_until_announced(receiver, self.job.timeout_s)
            self._began.append(time.monotonic_ns())
            self.link.tell()
            wait(receiver, self.job.timeout_s)
            self._ready.append(time.monotonic_ns())
            if number == len(self._rooms) - 1:
                self._last = receiver
            else:
                receiver.clear()
        for receiver in self._large:
            wait(receiver, self.job.timeout_s)

    def finish(self) -> Facts:
        for receiver in self._large:
            receiver.clear()
        counted = [
            at
            for began, at in zip(self._began, self._ready, strict=True)
            if not self._large or began < self._large_ended
        ]
        return super().finish() | {"ends": counted[WARM_UP:]}

    def _sink(self) -> GatherSink:
        return into(self._small) if self._small else GatherSink(in_place=True)

    def _open_and_wait(self, receivers: list[EmbeddingReceiver], rooms: list[int]) -> None:
        opened = [self.ask(room, into(self._whole)) for room in rooms]
        for receiver in opened:
            wait_until_announced(receiver, self.job.timeout_s)
        receivers += opened

    def _note(self) -> None:
        """Notes when the large embedding has arrived. Runs on the manager's thread."""
        if not self._large_ended and self._large[0].has_ended:
            self._large_ended = time.monotonic_ns()


class AtOnceSending(_SmallSending):
    def send(self) -> None:
        for sender in keep_open(self._rooms, self._begin, self.job.options["at_once"], self.job.timeout_s):
            sender.clear()

    def _begin(self, room: int) -> EmbeddingSender:
        sender = self.announce(room, self._tokens)
        sender.send_embedding(self._fields)
        return sender


class AtOnceReceiving(_SmallReceiving):
    def receive(self) -> None:
        last: EmbeddingReceiver | None = None
        for receiver in keep_open(self._rooms, self._begin, self.job.options["at_once"], self.job.timeout_s):
            if last is not None:
                last.clear()
            last = receiver
        assert last is not None  # a round has transfers
        self._last = last

    def _begin(self, room: int) -> EmbeddingReceiver:
        return self.ask(room, GatherSink(in_place=True))


def keep_open(rooms: Iterable[int], begin: Callable[[int], H], at_once: int, timeout_s: float) -> Iterable[H]:
    """Begins a transfer in each room, ``at_once`` of them at a time, and yields each when it has ended.

    Raises:
        EmbeddingTransferError: One has failed.
        queue.Empty: Nothing has happened for ``timeout_s``.
    """
    changed, left, under_way = SimpleQueue[H](), iter(rooms), dict[H, None]()

    def begin_next() -> None:
        for room in left:
            handle = begin(room)
            under_way[handle] = None
            handle.wake_on_change(partial(changed.put, handle))
            changed.put(handle)  # it may have ended before
            return

    for _ in range(at_once):
        begin_next()
    while under_way:
        handle = changed.get(timeout=timeout_s)
        if handle in under_way and handle.has_ended:
            del under_way[handle]
            begin_next()
            wait(handle, 0)  # raises its error
            yield handle


def _draw(count: int) -> list[int]:
    return [secrets.randbits(62) + 1 for _ in range(count)]
