"""The journal of a router: the requests of now and of lately. Bounded, without I/O; the live page is made from it.

It holds nothing that clients send: no text, no media, no header and no id that a client has chosen. Requests have
numbers, which the router's log repeats. It belongs to the event loop: no method may be called from another thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from embferry.protocol.text import printable
from embferry.serve.http.request_trace import NO_CALL, Call, RequestTrace
from embferry.serve.http.samples import Second, rounded
from embferry.traces.spans import Tracer

Phase = Literal["fetch", "encode", "transfer", "prefill", "decode", "answer"]
"""The work that a request waits for.

``fetch`` is the body and its media; ``transfer`` lasts from the first token of the embedding to the last. ``answer`` is
transfer, prefill and, unless the answer is streamed, decode at an instance of vLLM, which tells of none of them.
"""
Series = Literal["ttft", "transfer"]
"""Times in seconds that are kept for a while: to the first token; of a transfer."""
EventKind = Literal[
    "resumed", "second_attempt", "encode_retry", "failover", "fallback", "error", "client_left", "worker_failed",
    "damaged", "worker_found", "worker_lost",
]  # fmt: skip

MAX_SHOWN, MAX_ENDED, MAX_EVENTS = 200, 60, 100
"""Requests under way that are told of, the oldest; ended requests; events."""
MAX_PHASES, MAX_ENCODERS = 32, 8
"""Phases and encoders of a request that are kept."""
MAX_TEXT = 200
"""Characters of an id or a reason."""
SAMPLED_SECONDS = 600
"""Seconds for which samples are kept."""
NEVER = -1
"""A version before all changes."""

_NO_PROGRESS: dict[str, Any] = {"tokens": 0, "total_tokens": 0, "transfers": 0, "bytes": 0, "transport": ""}


@dataclass(slots=True)
class Event:
    """One event, which has happened ``count`` times in a row, last ``at`` and to that request."""

    id: int
    kind: EventKind
    request: int | None
    facts: dict[str, str]
    at: float
    changed: int
    count: int = 1

    def view(self) -> dict[str, Any]:
        """Returns the event as JSON has it."""
        known = {"id": self.id, "kind": self.kind, "request": self.request, "count": self.count}
        return known | {"at": rounded(self.at), **self.facts}


class RequestRecord:
    """One request, from its arrival to its end. Nothing changes after that.

    Attributes:
        number: counts the requests of this router.
        path: one of the router's paths.
        outcome: ``answered``, ``client left``, or the code of its error; empty while it is under way.
        changed: the version of the journal at the last change.
        trace: its spans; None unless they are wanted.
    """

    def __init__(self, journal: Journal, number: int, path: str) -> None:
        self._journal, self.number, self.path = journal, number, path
        self.began = journal.now
        self.streams, self.images, self.videos, self.sounds = False, 0, 0, 0
        self.phases: list[tuple[str, float, float | None]] = [("fetch", self.began, None)]
        self.encoders: list[str] = []
        self.language = ""
        self.transfer: dict[str, Any] | None = None
        self.attempts = 1
        self.ttft: float | None = None
        self.ended: float | None = None
        self.outcome = ""
        self.changed = NEVER
        self._resumes: Event | None = None  # the event of this attempt's resumed transfers
        self.trace: RequestTrace | None = None

    def describe(self, *, streams: bool, kinds: Collection[str]) -> None:
        """Notes what was asked.

        Args:
            streams: the answer is a stream.
            kinds: ``image``, ``video`` or ``audio`` for each.
        """
        if self.ended is None:
            self.streams = streams
            counts = Counter(kinds)
            self.images, self.videos, self.sounds = counts["image"], counts["video"], counts["audio"]
            self._touch()
            if self.trace is not None:
                self.trace.describe(streams=streams, kinds=kinds)

    def phase(self, name: Phase) -> None:
        """Begins a phase, which ends the one before. Does nothing if it is under way."""
        if self.ended is None and self.phases[-1][0] != name and len(self.phases) < MAX_PHASES:
            self._end_phase(self._journal.now)
            self.phases.append((name, self._journal.now, None))
            self._touch()
            if self.trace is not None:
                self.trace.phase(name)

    def asks(self, role: str, worker: str, *, beside_others: bool = False, stage: str = "") -> Call:
        """Notes that a worker is asked. It replaces the workers of its role that were asked before.

        Args:
            role: the worker's.
            worker: its id.
            beside_others: the encoders that were asked before stay; each has items of its own.
            stage: the role of an instance that is one of several for the answer.

        Returns:
            The call. Its headers tell the worker of the trace, and it ends with the call.
        """
        if self.ended is not None:
            return NO_CALL
        worker = printable(worker, MAX_TEXT)
        if role == "language":
            self.language = worker
        elif not beside_others:
            self.encoders = [worker]
        elif worker not in self.encoders and len(self.encoders) < MAX_ENCODERS:
            self.encoders.append(worker)
        self._touch()
        return NO_CALL if self.trace is None else self.trace.asks(stage or role, worker)

    def progress(self, told: dict[str, Any]) -> None:
        """Notes how much of the embedding has arrived.

        Args:
            told: ``tokens`` of ``total_tokens``; ``transfers``, of which the first is the initial one; ``bytes`` of the
                whole; ``transport``.
        """
        if self.ended is not None:
            return
        self.transfer = {name: told.get(name, default) for name, default in _NO_PROGRESS.items()}
        if (resumes := self.transfer["transfers"] - 1) > 0:
            if self._resumes is None:
                self._resumes = self._journal.event("resumed", request=self, worker=self.language)
            self._journal.repeat(self._resumes, resumes)
        self._touch()
        if self.trace is not None:
            self.trace.progress(self.transfer)

    def begins_again(self, code: str, worker: str) -> None:
        """Notes that the attempt has failed, and another one follows."""
        if self.ended is None:
            self._journal.event("second_attempt", request=self, code=code, worker=worker)
            self.attempts += 1
            self.encoders, self.transfer, self._resumes = [], None, None
            self._touch()

    def arrives(self, told: dict[str, Any]) -> None:
        """Notes how much of the embedding has arrived at a language worker, and that it has begun to."""
        if self.phases[-1][0] == "encode":
            self.phase("transfer")
        self.progress(told)

    def has_transferred(self, seconds: float, ago: float) -> None:
        """Notes that all of the embedding has arrived.

        Args:
            seconds: from its first token to its last.
            ago: seconds since the last token; the worker that tells of it may have been busy meanwhile.
        """
        self._journal.sample("transfer", seconds)
        if self.phases[-1][0] == "transfer" and self.ended is None:
            self.phases.pop()
            name, begin, _ = self.phases.pop()
            last = max(begin, self._journal.now - ago)
            first = max(begin, last - seconds)
            self.phases += [(name, begin, first), ("transfer", first, last), ("prefill", last, None)]
            self._touch()

    def first_token(self, seconds: float) -> None:
        """Notes the time to the first token and begins ``decode``."""
        self._journal.sample("ttft", seconds)
        if self.ended is None:
            self.ttft = seconds
            self.phase("decode")
            self._touch()
            if self.trace is not None:
                self.trace.first_token()

    def fails(self, code: str) -> None:
        """Ends the request with an error."""
        if self.ended is None:
            self._journal.event("error", request=self, code=code)
            self.end(code)

    def end(self, outcome: str) -> None:
        """Ends the request, unless it has ended."""
        if self.ended is None:
            self.ended = self._journal.now
            self._end_phase(self.ended)
            self.outcome = printable(outcome, MAX_TEXT)
            self._journal.has_ended(self)
            self._touch()
            if self.trace is not None:
                self.trace.end(self.outcome, self.attempts)

    def view(self) -> dict[str, Any]:
        """Returns the record as JSON has it."""
        return {
            "number": self.number,
            "path": self.path,
            "began": rounded(self.began),
            "ended": rounded(self.ended),
            "streams": self.streams,
            "images": self.images,
            "videos": self.videos,
            "sounds": self.sounds,
            "phases": [(name, rounded(begin), rounded(end)) for name, begin, end in self.phases],
            "encoders": self.encoders,
            "language": self.language,
            "transfer": self.transfer,
            "attempts": self.attempts,
            "ttft": rounded(self.ttft),
            "outcome": self.outcome,
        }

    def _end_phase(self, now: float) -> None:
        name, begin, _ = self.phases[-1]
        self.phases[-1] = (name, begin, now)

    def _touch(self) -> None:
        self.changed = self._journal.next_version()


class Journal:
    """The journal of a router.

    Args:
        clock: monotonic seconds.
        tracer: makes the spans of requests; None for none.
        tells_decode: as for :class:`.RequestTrace`.

    Attributes:
        version: counts the changes.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
        *,
        tells_decode: bool = False,
    ) -> None:
        self._clock, self._start = clock, clock()
        self._tracer, self._tells_decode = tracer, tells_decode
        self.version = 0
        self._count = 0
        self._shown: dict[int, RequestRecord] = {}
        self._others: dict[int, RequestRecord] = {}  # under way too, and next in turn to be shown
        self._ended: deque[RequestRecord] = deque(maxlen=MAX_ENDED)
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._samples: dict[str, deque[Second]] = {}

    @property
    def now(self) -> float:
        """Seconds since the journal began."""
        return self._clock() - self._start

    def next_version(self) -> int:
        """Counts a change. Returns the new version."""
        self.version += 1
        return self.version

    def begin(self, path: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> RequestRecord:
        """Returns the record of a new request. ``headers``: its own, which may name a span of the client."""
        self._count += 1
        record = RequestRecord(self, self._count, path)
        if self._tracer is not None:
            tells_decode = self._tells_decode
            record.trace = RequestTrace(self._tracer, path, headers, record.number, tells_decode=tells_decode)
        record.changed = self.next_version()
        (self._shown if len(self._shown) < MAX_SHOWN else self._others)[record.number] = record
        return record

    @contextlib.contextmanager
    def request(self, path: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Iterator[RequestRecord]:
        """Keeps the record of a request, which is :func:`current_record` for this code and the tasks that it starts."""
        record = self.begin(path, headers)
        token = _CURRENT.set(record)
        try:
            yield record
        except Exception:
            record.fails("internal_error")
            raise
        finally:
            _CURRENT.reset(token)
            record.end("client left")

    def has_ended(self, record: RequestRecord) -> None:
        """Moves a record to the ended ones."""
        if self._shown.pop(record.number, None) is None and self._others.pop(record.number, None) is None:
            return
        self._ended.append(record)
        if self._others and len(self._shown) < MAX_SHOWN:
            number = next(iter(self._others))
            promoted = self._shown[number] = self._others.pop(number)
            promoted.changed = self.next_version()

    def event(
        self,
        kind: EventKind,
        *,
        request: RequestRecord | None = None,
        worker: str = "",
        role: str = "",
        code: str = "",
        reason: str = "",
    ) -> Event:
        """Notes an event, or repeats the last one if that was the same, of any request.

        Args:
            kind: what has happened.
            request: to which it has happened; None: to none, or to the one that this code runs for.
            worker: the worker that it is about.
            role: of that worker.
            code: of the error.
            reason: without anything that a client has sent.

        Returns:
            The event.
        """
        texts = {"worker": worker, "role": role, "code": code, "reason": reason}
        facts = {name: printable(text, MAX_TEXT) for name, text in texts.items() if text}
        record = request or _CURRENT.get()
        number = None if record is None else record.number
        if record is not None and record.trace is not None:
            record.trace.event(kind, facts)
        last = self._events[-1] if self._events else None
        if last is not None and (last.kind, last.facts) == (kind, facts) and kind != "resumed":
            last.request = number
            self.repeat(last, last.count + 1)
            return last
        event = Event(1 if last is None else last.id + 1, kind, number, facts, self.now, self.next_version())
        self._events.append(event)
        return event

    def repeat(self, event: Event, count: int) -> None:
        """Notes that an event has happened ``count`` times by now."""
        event.count, event.at, event.changed = count, self.now, self.next_version()

    def sample(self, series: Series, seconds: float) -> None:
        """Adds a time to a series."""
        kept = self._samples.setdefault(series, deque())
        second = int(self.now)
        if not kept or kept[-1].second != second:
            kept.append(Second(second))
        kept[-1].add(seconds, self.next_version())
        while kept[0].second <= second - SAMPLED_SECONDS:
            kept.popleft()

    def since(self, version: int) -> dict[str, Any]:
        """Returns all that has changed since a version, as JSON has it; everything since ``NEVER``.

        A reader that applies it to its earlier state has the same as one that asks for everything: it keeps the
        requests of ``running``, the latest ``MAX_ENDED`` ended ones, and the latest ``MAX_EVENTS`` events.
        """
        records = [record for record in (*self._ended, *self._shown.values()) if record.changed > version]
        return {
            "now": rounded(self.now),
            "version": self.version,
            "under_way": len(self._shown) + len(self._others),
            "running": list(self._shown),
            "requests": [record.view() for record in records],
            "events": [event.view() for event in self._events if event.changed > version],
            "samples": {
                series: [second.view() for second in kept if second.changed > version]
                for series, kept in self._samples.items()
            },
        }


_CURRENT: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def current_record() -> RequestRecord:
    """Returns the record of the request for which this code runs; one that is not kept if it runs for none."""
    return _CURRENT.get() or RequestRecord(Journal(), 0, "")
