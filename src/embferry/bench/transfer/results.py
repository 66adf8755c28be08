"""Samples of ``embferry bench transfer``."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ..results import Results
from .payloads import Payload

Status = Literal["ok", "missing", "error", "skipped"]
Kind = Literal["ours", "engine", "peer", "limit"]


class Sample(msgspec.Struct, frozen=True):
    """One round. Times in seconds, sizes in bytes."""

    seconds: float
    sender_cpu: float
    receiver_cpu: float
    memory_beyond: int
    """The receiver's peak so far, beyond what it had at first and beyond one payload."""
    transfers: int | None = None
    """Number of embferry's transfers, initial and resumed."""
    waits: list[float] = []
    """Seconds from the start until each embedding may be used, if a round has several."""


class Measurement(msgspec.Struct):
    """One candidate with one payload."""

    candidate: str
    label: str
    kind: Kind
    payload: Payload
    status: Status = "ok"
    reason: str = ""
    """Why the status is not ``ok``."""
    samples: list[Sample] = []
    pool_bytes: int = 0
    group: int = 0
    """Those of one group took turns; there are several groups if memory did not suffice for all at once."""
    sweep: str = ""
    """The sweep it is a point of; empty for the comparison."""
    x: float = 0.0
    options: dict[str, Any] = {}


class TransferResults(Results, tag="transfer", kw_only=True):
    measurements: list[Measurement] = msgspec.field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Reasons of the candidates that failed; those that are not installed are not among them."""
        return [f"{m.label}, {m.payload.name}: {m.reason}" for m in self.measurements if m.status == "error"]
