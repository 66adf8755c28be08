"""One room of the simulation: its embeddings, its ends, what may end it, and whether it ended as it must."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from embferry import ChunkSink, EmbeddingReceiver, EmbeddingSender, Fields, GatherSink, KVPoll, Sink
from embferry.protocol.layout import Field, Layout
from embferry.protocol.ranges import RangeSet
from embferry.transfer.fields import Array
from embferry.transfer.handle import ENDED
from embferry.transfer.sinks import ArrivedChunk

from .doubles import Breakable, Fault, HostTarget, PatientExecutor, ProbedChunkSink, ProbedDeviceSink, ProbedGatherSink

if TYPE_CHECKING:
    from .simulation import Simulation, Worker

LAYOUT = Layout((Field("input_embeddings", "uint8", 8), Field("fill_ids", "int32", 1)))
SINKS = ("gather", "make", "in place", "chunks", "device", "in place, make")
ANYTHING = ""
"""An excuse that every error satisfies."""


class InvariantError(AssertionError):
    """An invariant of the simulation is broken."""


def must(condition: bool, otherwise: str) -> None:
    """Raises :class:`InvariantError` with the text ``otherwise`` unless the condition holds."""
    if not condition:
        raise InvariantError(otherwise)


def content(number: int, version: int, tokens: int) -> Fields:
    """Returns an embedding: uint8 [tokens, bytes a token] for each field."""
    rng = np.random.default_rng((number, version, tokens))
    return {f.name: rng.integers(0, 256, (tokens, f.token_bytes), np.uint8) for f in LAYOUT.fields}


def length(digest: bytes) -> int:
    """Returns the number of tokens of the embedding that has a digest."""
    return digest[2]


@dataclass(eq=False)
class Sending:
    """A sending end of a room, and the embedding that it reads from.

    Attributes:
        excuses: Parts of the texts with which it may fail.
        produced: Tokens produced so far; -1: nothing has been announced.
        is_current: Whether the receiver asks this end; otherwise it may end in any way.
    """

    worker: Worker
    end: EmbeddingSender
    digest: bytes
    rows: dict[str, Array]
    source: dict[str, object]
    checksums: object = None
    produced: int = -1
    excuses: set[str] = field(default_factory=set)
    is_current: bool = True
    has_ended: bool = False
    references: list[weakref.ref[Array]] = field(default_factory=list)

    @property
    def is_there(self) -> bool:
        return not self.worker.runtime.killed

    def is_collected(self) -> bool:
        """Returns whether nothing refers to the embedding any more but, at most, frames of errors in circles."""
        if any(reference() is not None for reference in self.references):
            gc.collect()
        return all(reference() is None for reference in self.references)


class Room:
    """One transfer.

    Attributes:
        number: The ``bootstrap_room``.
        embeddings: By digest, every embedding that some sender of it has.
        excuses: Parts of the texts with which the receiver may fail.
        lied: Whether its own peer has lied.
        has_bug: Whether a method of one of its machines has raised.
        passes: Passes of a verification, beyond those of the sink.
    """

    def __init__(
        self, simulation: Simulation, number: int, tokens: int, sink: int, language: Worker, seed: int
    ) -> None:
        self.simulation, self.number, self.tokens, self.language = simulation, number, tokens, language
        self.kind = SINKS[sink % len(SINKS)]
        self.breakable = Breakable(simulation.world, self._fired)
        self.embeddings: dict[bytes, Fields] = {}
        self.senders: list[Sending] = []
        self.receiver: EmbeddingReceiver | None = None
        self.sink: Sink = self._make_sink()
        self.endpoint = ""
        self.excuses: set[str] = set()
        self.lied = self.has_bug = self.sink_has_raised = False
        self.passes = (1, 3, 9)[seed % 3]
        self.has_ended = self.is_cleared = False
        self.held: list[tuple[ArrivedChunk, bytes]] = []
        self.taken = RangeSet()
        self.used: list[tuple[dict[str, Array], int, bytes]] = []  # arrays that were read, up to a token, of a content
        self.used_digest: bytes | None = None
        self.stops: list[Callable[[], object]] = []  # remove callbacks and waiters
        self.seen_by_callbacks: dict[object, KVPoll] = {}
        self.seen_by_waiters: dict[object, KVPoll] = {}

    def __repr__(self) -> str:
        return f"room {self.number} ({self.kind}, {self.tokens} tokens)"

    # What users do

    @property
    def is_there(self) -> bool:
        """Whether there is a receiver in a living process."""
        return self.receiver is not None and not self.language.runtime.killed

    @property
    def current(self) -> Sending | None:
        return next((sending for sending in self.senders if sending.is_current), None)

    def open_receiver(self, endpoint: str, failover: float | None) -> None:
        self.endpoint = endpoint
        self.receiver = self.language.manager.open(self.number, endpoint, self.sink, failover_timeout=failover)
        self._watch(self.receiver)
        self.receiver.init()

    def open_sender(self, worker: Worker, version: int, *, device: bool = False, broken: bool = False) -> Sending:
        """Opens a sending end, with a copy of an embedding that later is overwritten."""
        digest = bytes((1 + version, self.number % 256, self.tokens))
        self.embeddings[digest] = content(self.number, version, self.tokens)
        rows = {name: array.copy() for name, array in self.embeddings[digest].items()}
        end = worker.manager.open(self.number)
        sending = Sending(worker, end, digest, rows, dict(rows))
        sending.references = [weakref.ref(array) for array in rows.values()]
        breakable = Breakable(self.simulation.world, lambda fault: sending.excuses.add(fault.marker))
        if device:
            sending.source = self.simulation.device_rows(breakable, rows)
        if broken:
            self.simulation.break_source(sending, breakable, device=device)
        self.senders.append(sending)
        self._watch(end)
        return sending

    def produce(self, sending: Sending, tokens: int) -> None:
        """Announces the embedding if need be, and produces more tokens."""
        if sending.has_ended or not sending.is_there or sending.end._record.poll() in ENDED:
            return
        if sending.produced < 0:
            sending.end.init(self.tokens, sending.digest, (self.tokens, 7))
            sending.produced = 0
        sending.produced = min(self.tokens, sending.produced + tokens)
        sending.end.send_embedding(sending.source, sending.produced, checksums=sending.checksums)  # type: ignore[arg-type]

    def take(self) -> None:
        """Takes a chunk, if there is one, and keeps its blocks."""
        if not isinstance(self.sink, ChunkSink) or self.receiver is None or self.breakable.busy:
            return
        chunk = self.sink.pop()
        if chunk is None:
            return
        digest = self.receiver.machine.content_digest or b""
        self._uses(digest)
        self.taken.add(chunk.offset, chunk.offset + chunk.length)
        expected = self._bytes(digest, chunk.offset, chunk.offset + chunk.length)
        self.held.append((chunk, expected))
        self._check_held(chunk, expected)

    def release(self) -> None:
        """Releases the blocks of the oldest chunk that is kept."""
        if self.held and not self.breakable.busy:
            chunk, expected = self.held.pop(0)
            self._check_held(chunk, expected)
            chunk.release()

    def read(self, commit: bool) -> None:
        """Reads what has arrived so far."""
        receiver = self.receiver
        if receiver is None or receiver.error is not None or not isinstance(self.sink, GatherSink):
            return
        if self.breakable.busy or self.is_cleared or not self.sink.arrays:
            return
        if not commit:
            arrays = receiver.buffered_chunks()
            if arrays is not None:
                self._check_arrays(arrays, receiver.transferred_tokens, receiver.machine.content_digest or b"")
            return
        arrays, tokens, digest = receiver.arrays(), receiver.transferred_tokens, receiver.machine.content_digest or b""
        self._uses(digest)
        self.used.append((arrays, tokens, digest))
        self._check_arrays(arrays, tokens, digest)

    def clear(self) -> None:
        """The user needs the room no longer."""
        if self.receiver is not None and not self.breakable.busy:
            for used in self.used:
                self._check_arrays(*used)
            self.used.clear()
            self.excuses.add("cleared")
            self.breakable.armed.clear()
            self.is_cleared = True
            self.receiver.clear()
            while isinstance(self.sink, ChunkSink) and (chunk := self.sink.pop()) is not None:
                chunk.release()

    def use_up(self) -> None:
        """Takes every chunk that has arrived, and clears the room if it has ended."""
        for _ in range(20 if self.kind == "chunks" else 0):
            self.take()
            self.release()
        if self.has_ended and not self.is_cleared and not self.breakable.busy:
            self.check_consumed()
            self.clear()

    # Whether it ended as it must

    def check_ended(self) -> None:
        """Looks whether the ends have ended, and checks how."""
        receiver = self.receiver
        if receiver is not None and self.is_there and not self.has_ended and receiver._record.poll() in ENDED:
            self.has_ended = True
            self._check_receiver(receiver)
        for sending in self.senders:
            over = sending.end._record.poll() in ENDED and sending.end.source_released
            if sending.is_there and not sending.has_ended and over:
                sending.has_ended = True
                self._check_sender(sending)

    def check_seen(self) -> None:
        """Checks that waiters and callbacks were told that each end has ended."""
        ends: list[tuple[Any, Worker]] = [(sending.end, sending.worker) for sending in self.senders]
        for end, worker in [*ends, (self.receiver, self.language)]:
            if end is not None and worker.is_there and end._record.poll() in ENDED:
                seen = self.seen_by_waiters.get(end)
                must(seen in ENDED, f"{self}: a waiter was not told of the end, only of {seen}")
                seen = self.seen_by_callbacks.get(end)
                must(seen in ENDED or worker.has_no_threads, f"{self}: a callback was not told of the end")

    def _check_receiver(self, receiver: EmbeddingReceiver) -> None:
        error = receiver._record.error
        if error is not None:
            self._check_error(f"{self}: the receiver", error, self.excuses, [s.excuses for s in self.senders])
            return
        digest = receiver.machine.content_digest or b""
        if self.lied:
            return
        must(digest in self.embeddings, f"{self} succeeded with a content that no sender has")
        if self.used_digest is not None:
            must(self.used_digest == digest, f"{self}: tokens of two contents were used")
        tokens = length(digest)
        if isinstance(self.sink, GatherSink) and tokens and not self.is_cleared:
            self.used.append((receiver.arrays(), tokens, digest))
        elif isinstance(self.sink, ProbedDeviceSink) and tokens:
            rows = {name: target.rows for name, target in self.sink.targets.items()}  # type: ignore[attr-defined]
            self._check_arrays(rows, tokens, digest)
        for used in self.used:
            self._check_arrays(*used)

    def check_consumed(self) -> None:
        """Checks that a transfer in chunks has delivered every token, after all were taken."""
        receiver = self.receiver
        if self.kind != "chunks" or receiver is None or self.lied or self.is_cleared:
            return
        if receiver._record.poll() is KVPoll.Success:
            tokens = length(receiver.machine.content_digest or b"")
            must(self.taken.prefix == tokens, f"{self} succeeded, but delivered up to {self.taken.prefix}")

    def _check_sender(self, sending: Sending) -> None:
        error = sending.end._record.error
        # the embedding belongs to the caller again, who overwrites it
        for array in sending.rows.values():
            array[:] = 0xEE
        sending.rows, sending.source, sending.checksums = {}, {}, None
        if error is not None and sending.is_current:
            others = [self.excuses, *(s.excuses for s in self.senders if s is not sending)]
            self._check_error(f"{self}: the sender", error, sending.excuses, others)

    def _check_error(self, end: str, error: Exception, excuses: set[str], others: list[set[str]]) -> None:
        """Checks that an end failed for a reason that it had, and says so."""
        detail = str(error)
        must(bool(detail), f"{end} failed without a reason")
        must(self.has_bug or "a bug in embferry" not in detail or self.lied, f"{end} failed by a bug: {detail}")
        allowed = [*excuses, *self.simulation.unlucky]
        if any(others) or any(excuse in detail for excuse in allowed):
            return
        if self.simulation.takes_floating(self, detail):
            return
        must(bool(excuses), f"{end} failed although nothing touched it: {detail}")
        raise InvariantError(f"{end} failed for another reason than {excuses}: {detail}")

    # Helpers

    def _fired(self, fault: Fault) -> None:
        self.excuses.add(fault.marker)

    def _watch(self, end: EmbeddingReceiver | EmbeddingSender) -> None:
        def see(what: str, seen: dict[object, KVPoll]) -> None:
            self.simulation.check_no_lock(what)
            seen[end] = end._record.poll()

        self.stops.append(end.on_change(partial(see, "a callback", self.seen_by_callbacks)))
        self.stops.append(end.wake_on_change(partial(see, "a waiter", self.seen_by_waiters)))

    def _make_sink(self) -> Sink:
        sink: ProbedSinks
        if self.kind == "chunks":
            sink = ProbedChunkSink()
        elif self.kind == "device":
            sink = ProbedDeviceSink(self._make_targets, self._copied)
            executor = sink._copier
            assert isinstance(executor, PatientExecutor)
            executor.is_busy = lambda: self.breakable.busy > 0
        else:
            make = self._make_arrays if "make" in self.kind else None
            sink = ProbedGatherSink(in_place="in place" in self.kind, make=make)
        sink.room = self
        return sink

    def _make_arrays(self, tokens: int) -> dict[str, Array]:
        self.simulation.check_no_lock("make()")
        must(tokens <= self.simulation.max_tokens, f"memory for {tokens} tokens was asked for")
        fault = self.breakable.armed.get("wrong")
        if fault is not None:
            del self.breakable.armed["wrong"]
            self.excuses.add("make() returned arrays for")
            return {}
        made: dict[str, Array] = self.breakable.call("make", new_arrays, tokens)
        return made

    def _make_targets(self, tokens: int) -> dict[str, HostTarget]:
        self.simulation.check_no_lock("make()")
        if self.breakable.armed.pop("wrong", None) is not None:
            self.excuses.add("make() returned no target for")
            return {}
        targets = {f.name: HostTarget(self, tokens, f.token_bytes) for f in LAYOUT.fields}
        return self.breakable.call("make", lambda: targets)  # type: ignore[no-any-return]

    def _copied(self) -> None:
        self.simulation.check_no_lock("copied()")
        self.breakable.call("copied", lambda: None)

    def _uses(self, digest: bytes) -> None:
        if self.used_digest not in (None, digest) and not self.lied:
            self.simulation.violated(f"{self}: tokens of two contents were used")
        self.used_digest = digest

    def _bytes(self, digest: bytes, start: int, stop: int) -> bytes:
        rows = self.embeddings.get(digest, {})
        return b"".join(array[start:stop].tobytes() for array in rows.values())

    def _check_held(self, chunk: ArrivedChunk, expected: bytes) -> None:
        if not self.lied and self.receiver is not None and not self.is_cleared:
            rows = self.sink.read(chunk)  # type: ignore[attr-defined]
            seen = b"".join(rows[f.name].tobytes() for f in LAYOUT.fields)
            must(seen == expected, f"{self}: the bytes of tokens from {chunk.offset} on are not those that were sent")

    def _check_arrays(self, arrays: Fields, tokens: int, digest: bytes) -> None:
        if not self.lied and digest in self.embeddings:
            for name, array in self.embeddings[digest].items():
                same = np.array_equal(arrays[name][:tokens], array[:tokens])
                must(same, f"{self}: the first {tokens} tokens are not those that were sent")


ProbedSinks = ProbedChunkSink | ProbedDeviceSink | ProbedGatherSink


def new_arrays(tokens: int) -> dict[str, Array]:
    """Returns arrays to gather into."""
    return {f.name: np.zeros((tokens, f.token_bytes), np.uint8) for f in LAYOUT.fields}
