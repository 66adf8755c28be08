"""The sending side of one link: asks for each write, has it written, says when it is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from embferry.protocol.errors import TransportError

from ...contract import LinkLost, Piece, Written
from ...net.connector import Connector
from ...net.loop import Loop
from ...outbox import Outbox
from .agent import Backends
from .channel import Channel
from .job import Job
from .messages import (
    MAX_FRAME,
    MAX_RANGES,
    Ask,
    Broken,
    Done,
    FrameError,
    Hello,
    Message,
    Stop,
    Verdict,
    Welcome,
    pack_ranges,
)
from .writer import Writer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkSettings:
    backends: Backends
    slice_bytes: int
    connect_timeout_s: float
    drain_timeout_s: float


class Link:
    """A connection to the receiver behind ``handle``.

    All but the constructor, ``write``, ``join`` and ``finished`` is for the loop's thread.

    :param forget: called when the link is over, before :class:`LinkLost` is posted.
    :raises TransportError: the connection is refused at once.
    """

    def __init__(
        self,
        handle: bytes,
        address: tuple[str, int],
        hello: Hello,
        settings: LinkSettings,
        loop: Loop,
        outbox: Outbox,
        forget: Callable[[bytes, Link], None],
    ) -> None:
        self._handle, self._hello, self._settings = handle, hello, settings
        self._loop, self._outbox, self._forget = loop, outbox, forget
        self.finished = threading.Event()
        self._lock = threading.Lock()  # of _jobs, _serial, _error and _ready
        self._jobs: dict[int, Job] = {}
        self._serial = 0
        self._error: TransportError | None = None
        self._lost = False
        self._channel: Channel | None = None
        self._hung_up = self._ready = self._awaits_hang_up = False
        self._dial = Connector(address, loop, settings.connect_timeout_s, self._on_connected, self._on_refused)
        self._writer = Writer(
            settings.backends,
            slice_bytes=settings.slice_bytes,
            drain_timeout_s=settings.drain_timeout_s,
            on_ready=lambda: loop.call(self._on_ready),
            on_over=self._on_over,
            on_end=lambda error, clean: loop.call(partial(self._on_writer_end, error, clean)),
            on_bug=outbox.fail,
        )
        self._dial.start()
        loop.call(lambda: loop.later(settings.connect_timeout_s, self._check_ready))
        self._writer.start()  # after that, so that its end comes after it too

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        """From any thread."""
        try:
            job = _job(epoch, pieces, ticket)
            with self._lock:
                if self._error is not None:
                    raise self._error
                job.serial = self._serial
                self._serial += 1
                self._jobs[job.serial] = job
                ready = self._ready
        except TransportError as error:
            self._outbox.post(Written(ticket, error))
            return
        if ready:
            self._ask(job)
        self._writer.put(job)  # registers the source while the receiver decides

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight, and the link. ``lost``: it was not this side that wanted it."""
        with self._lock:
            if self._error is not None:
                return
            self._error, self._lost = error, lost
        self._writer.stop()

    def join(self, timeout_s: float) -> None:
        """From any thread: waits for the writer's thread."""
        self._writer.join(timeout_s)

    # The connection.

    def _check_ready(self) -> None:
        if not self._ready:
            limit = self._settings.connect_timeout_s
            self.end(TransportError(f"the receiver did not answer within {limit} s"), lost=True)

    def _on_refused(self, error: TransportError) -> None:
        self._hung_up = True
        self.end(error, lost=True)

    def _on_connected(self) -> None:
        self._channel = Channel(
            self._dial.sock,
            self._loop,
            on_message=self._on_message,
            on_fault=lambda error: self._on_hang_up(str(error)),
            on_end=self._on_hang_up,
            limit=MAX_FRAME,
        )
        self._channel.send(self._hello)

    def _on_hang_up(self, reason: str) -> None:
        self._hung_up = True
        if self.finished.is_set():
            return
        self.end(TransportError(f"the connection to the receiver broke: {reason}"), lost=True)
        if self._awaits_hang_up:
            self._finish()

    def _on_message(self, message: Message) -> None:
        match message:
            case Welcome(metadata, base):
                self._writer.meet(metadata, base)
            case Verdict(serial, go):
                job = self._jobs.get(serial)
                if job is None:
                    raise FrameError(f"a verdict on the write {serial}, which is not in flight")
                job.go = go
                self._writer.look()
            case Stop(serial):
                stopped = self._jobs.get(serial)
                if stopped is not None:  # else our "done" is on its way
                    stopped.stopped = True
            case _:
                raise FrameError(f"a receiver does not say {type(message).__name__}")

    # Writes.

    def _ask(self, job: Job) -> None:
        if self._channel is not None:
            self._channel.send(Ask(job.serial, job.epoch, pack_ranges(job.ranges)))

    def _on_ready(self) -> None:
        with self._lock:
            self._ready = True
            jobs = list(self._jobs.values())
        for job in jobs:
            self._ask(job)

    def _on_over(self, job: Job, error: TransportError | None) -> None:
        """On the writer's thread: the receiver hears of it first."""
        if job.go and self._channel is not None:
            self._channel.send(Done(job.serial))
        with self._lock:
            del self._jobs[job.serial]
        self._outbox.post(Written(job.ticket, error))

    # The end: the writer has stopped; if bytes may be on their way, the receiver destroys its agent; it is over.

    def _on_writer_end(self, error: TransportError | None, clean: bool) -> None:
        with self._lock:
            if self._error is None:
                self._error, self._lost = error or TransportError("the engine has ended"), True
        if clean or self._hung_up or self._channel is None:
            self._finish()
            return
        self._awaits_hang_up = True
        self._channel.send(Broken())
        self._loop.later(self._settings.connect_timeout_s, self._finish)

    def _finish(self) -> None:
        if self.finished.is_set():
            return
        self._awaits_hang_up = False
        if self._channel is not None:
            self._channel.close()
        else:
            self._loop.unwatch(self._dial.sock.fileno())
            self._dial.sock.close()
        self._forget(self._handle, self)
        error = self._error or TransportError("this link has ended")
        for job in self._jobs.values():
            self._outbox.post(Written(job.ticket, error))
        self._jobs.clear()
        if self._lost:
            log.info("lost the connection to a receiver: %s", error)
            self._outbox.post(LinkLost(self._handle, error))
        self.finished.set()


def _job(epoch: int, pieces: Sequence[Piece], ticket: int) -> Job:
    """:raises TransportError: there is no such write; not worth a retry."""
    if not 1 <= len(pieces) <= MAX_RANGES:
        raise TransportError(f"a write of {len(pieces)} pieces; make it 1 to {MAX_RANGES}", retryable=False)
    try:
        job = Job(ticket, epoch, pieces)
    except OverflowError:
        job = None
    if job is None or not 0 <= epoch < 1 << 64:
        raise TransportError("an offset or the epoch of the write is beyond 64 bits", retryable=False)
    return job
