"""Samples of ``embferry bench serve``."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..results import Results
from .workload import Drawn, Plan

Status = Literal["ok", "error", "skipped"]


class Sample(msgspec.Struct, frozen=True):
    """One request. Times in seconds; ``began`` since the run began, the others since ``began``."""

    number: int
    began: float
    pictures: int
    image_tokens: int
    repeated: int
    status: int | None
    """HTTP status; None if no answer came."""
    error: str
    """Why the request failed; empty if it was answered."""
    ttft: float | None
    """Until the first chunk with a choice."""
    itls: tuple[float, ...]
    """Between chunks with a choice."""
    latency: float
    """Until the last chunk with a choice, or until the failure was known."""
    output_tokens: int
    prompt_tokens: int | None
    """As the server counts; None if it does not say."""
    tokens: tuple[int, ...]
    text: str
    wrong: bool | None = None
    """True if the answer differs from the undivided engine's; None if it was not compared."""

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
    tokens: tuple[int, ...]
    text: str


class Run(msgspec.Struct):
    """One workload against one endpoint."""

    name: str
    """The configuration's name, or the endpoint's URL."""
    title: str
    scenario: str = ""
    round: int = 1
    status: Status = "ok"
    reason: str = ""
    """Why the status is not ``ok``."""
    plan: Plan | None = None
    drawn: Drawn | None = None
    max_tokens: int = 0
    concurrency: int = 0
    samples: list[Sample] = []
    duration: float = 0.0
    """Seconds from the first request to the end of the last."""
    complete: bool = True
    """False if the run was interrupted; the samples are those that had ended."""
    counters: dict[str, float | None] = {}
    """Rises of the servers' counters, by the names in :mod:`.counters`; None if no server reports one."""
    notes: list[str] = []
    """Remarks for the report, such as the damage that was done."""
    damaged_at: float | None = None
    """Seconds from the first request until an encoder was killed; None if none was."""


class ServingResults(Results, tag="serving", kw_only=True):
    compared: bool = False
    """True if the servers were started here, to compare them."""
    runs: list[Run] = msgspec.field(default_factory=list)
    setting: list[tuple[str, str]] = msgspec.field(default_factory=list)
    """More facts for the report."""
