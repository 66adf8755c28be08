"""What a run brings: raw samples, what was asked of the servers' metrics, and where it was. All that is shown is made
from this alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from ..results import Machine
from .workload import Drawn, Plan

SCHEMA = 1

Status = Literal["ok", "error", "skipped"]
Tokens = tuple[int, ...]


class Sample(msgspec.Struct, frozen=True):
    """One request. Times in seconds; ``began`` since the run began, the others since ``began``."""

    number: int
    began: float
    pictures: int
    image_tokens: int
    repeated: int
    status: int | None
    """HTTP; None: no answer came."""
    error: str
    """Why it failed; empty: it was answered."""
    ttft: float | None
    """Until the first chunk with a choice."""
    itls: tuple[float, ...]
    """Between chunks with a choice."""
    latency: float
    """Until the last chunk with a choice; of one that failed, until that was known."""
    output_tokens: int
    prompt_tokens: int | None
    """As the server counts; None: it does not say."""
    tokens: Tokens
    text: str
    wrong: bool | None = None
    """Whether it is another answer than the undivided engine's; None: not compared."""

    @property
    def answered(self) -> bool:
        return not self.error

    @property
    def right(self) -> bool:
        return self.answered and not self.wrong

    @property
    def ended(self) -> float:
        return self.began + self.latency


class Answer(msgspec.Struct, frozen=True):
    tokens: Tokens
    text: str


class Reference(msgspec.Struct, frozen=True):
    """The right answers of a scenario, by the number of the request."""

    scenario: str
    model: str
    """A digest of its files."""
    plan: Plan | None
    max_tokens: int
    answers: dict[int, Answer]


class Event(msgspec.Struct, frozen=True):
    """Something that was done to the servers."""

    at: float
    """Seconds since the run began."""
    what: str


class Run(msgspec.Struct):
    """One workload against one endpoint."""

    name: str
    """The configuration, or the endpoint."""
    title: str
    scenario: str = ""
    round: int = 1
    """The how-manieth of the same."""
    status: Status = "ok"
    reason: str = ""
    """Why it is not ``ok``."""
    plan: Plan | None = None
    drawn: Drawn | None = None
    max_tokens: int = 0
    concurrency: int = 0
    samples: list[Sample] = []
    duration: float = 0.0
    """Seconds from the first request to the end of the last."""
    complete: bool = True
    """False: it was interrupted; the samples are those that had ended."""
    counters: dict[str, float | None] = {}
    """What the servers counted meanwhile, by the names of :mod:`counters`; None: none of them reports it."""
    events: list[Event] = []
    notes: list[str] = []


class Results(msgspec.Struct):
    schema: int
    command: str
    started: str
    """ISO 8601, UTC."""
    took_s: float
    quick: bool
    compared: bool
    """Whether the servers were started here, to compare them."""
    machine: Machine
    runs: list[Run]
    complete: bool = True
    """False: it was interrupted; what has been measured by then is there."""
    references: list[Reference] = []
    setting: list[tuple[str, str]] = []
    """What else has to be known of it."""


def save(results: Results, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def load(path: Path) -> Results:
    """:raises ValueError: not such a file, or of another version of this program."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} has no results of bench serve: {error}") from error
    if results.schema != SCHEMA:
        raise ValueError(f"{path} has results of format {results.schema}, this program knows {SCHEMA}")
    return results
