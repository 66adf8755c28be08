"""Messages of a router at ``/activity`` and ``/activity/stream``, checked, with texts that a terminal can show.

A router may be of another version: fields that are not known here are left out, and so are unknown kinds of phases and
events where they would be counted.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from embferry.protocol.text import printable
from embferry.serve.http.journal import MAX_TEXT

MAX_NUMBER = 1e15
_Number = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
_Time = Annotated[float, msgspec.Meta(ge=0, le=MAX_NUMBER)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=int(MAX_NUMBER))]


class Shown(str):
    """A text of a router that has no control characters, and is not long."""

    __slots__ = ()


class Worker(msgspec.Struct, frozen=True):
    """A worker, or an instance of vLLM; :class:`embferry.serve.http.backends.KnownWorker`."""

    id: Shown
    role: Shown
    url: Shown
    up: bool
    in_flight: _Count = 0
    models: tuple[Shown, ...] = ()
    trouble: Shown = Shown()


class Pool(msgspec.Struct, frozen=True):
    """The receive pool of a language worker in blocks, or the ``error`` of the router's question for it."""

    worker: Shown
    num_blocks: _Count = 0
    used: _Count = 0
    quarantined: _Count = 0
    error: Shown = Shown()


class Transfer(msgspec.Struct, frozen=True):
    """How much of an embedding has arrived, in how many transfers, of which the first is the initial one."""

    tokens: _Count = 0
    total_tokens: _Count = 0
    transfers: _Count = 0
    bytes: _Count = 0
    transport: Shown = Shown()

    @property
    def resumes(self) -> int:
        """The resumed transfers."""
        return max(0, self.transfers - 1)


class Phase(msgspec.Struct, frozen=True, array_like=True):
    """A phase of a request; ``end`` is None while it is under way."""

    name: Shown
    begin: _Number
    end: _Number | None


class Request(msgspec.Struct, frozen=True):
    """A request; :class:`embferry.serve.http.journal.RequestRecord`. Times are seconds of the router's journal."""

    number: _Count
    began: _Number
    ended: _Number | None
    phases: Annotated[tuple[Phase, ...], msgspec.Meta(min_length=1)]
    path: Shown = Shown()
    streams: bool = False
    images: _Count = 0
    videos: _Count = 0
    encoders: tuple[Shown, ...] = ()
    language: Shown = Shown()
    transfer: Transfer | None = None
    attempts: _Count = 1
    ttft: _Number | None = None
    outcome: Shown = Shown()

    @property
    def phase(self) -> str:
        """The phase that is under way; "" after the end."""
        return self.phases[-1].name if self.ended is None else ""

    @property
    def resumes(self) -> int:
        """The resumed transfers of the latest attempt."""
        return 0 if self.transfer is None else self.transfer.resumes


class Event(msgspec.Struct, frozen=True):
    """An event, which has happened ``count`` times in a row, last ``at``."""

    id: _Count
    kind: Shown
    at: _Number
    count: _Count = 1
    request: _Count | None = None
    worker: Shown = Shown()
    role: Shown = Shown()
    code: Shown = Shown()
    reason: Shown = Shown()


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """The times that were taken within one second."""

    second: _Number
    count: _Count
    total: _Time
    lowest: _Time
    highest: _Time


class Told(msgspec.Struct, frozen=True):
    """One message: everything if ``first`` or from ``/activity``, else what has changed since the last one."""

    now: _Number
    version: int
    under_way: _Count
    running: tuple[_Count, ...]
    requests: tuple[Request, ...]
    events: tuple[Event, ...]
    samples: dict[str, tuple[Sample, ...]]
    workers: tuple[Worker, ...]
    missing: tuple[Shown, ...]
    totals: dict[str, _Number]
    router: Shown
    engine: Shown
    pools: tuple[Pool, ...] | None = None
    first: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The models of all workers, each once."""
        return tuple(dict.fromkeys(model for worker in self.workers for model in worker.models))


class NotActivityError(ValueError):
    """A message is not one of a router, or of a version that this one does not know."""


def read(data: bytes) -> Told:
    """Returns a message.

    Raises:
        NotActivityError: it is none.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: of bytes that are not UTF-8
        raise NotActivityError(printable(str(error), MAX_TEXT)) from error


def _shown(kind: type, value: Any) -> Any:
    if kind is Shown and isinstance(value, str):
        return Shown(printable(value, MAX_TEXT))
    raise ValueError(f"Expected `str`, got `{type(value).__name__}`")


_DECODER = msgspec.json.Decoder(Told, dec_hook=_shown)
