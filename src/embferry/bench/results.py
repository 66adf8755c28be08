"""What a run brings: raw samples and where they were taken. All that is shown is made from this alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from .payloads import Payload

SCHEMA = 1

Status = Literal["ok", "missing", "error", "skipped"]
Kind = Literal["ours", "engine", "peer", "limit"]


class Sample(msgspec.Struct, frozen=True):
    """One round. Times in seconds, sizes in bytes."""

    seconds: float
    sender_cpu: float
    receiver_cpu: float
    wire_bytes: int | None
    """Everything that crossed; None: it went a way on which it cannot be counted."""
    memory_beyond: int
    """The receiver's peak so far, beyond what it had at first and beyond one payload."""
    details: dict[str, Any] = {}


class Measurement(msgspec.Struct):
    """One contestant with one payload."""

    contestant: str
    label: str
    kind: Kind
    payload: Payload
    status: Status = "ok"
    reason: str = ""
    """Why it is not ``ok``."""
    samples: list[Sample] = []
    verified_rounds: int = 0
    """Rounds after which the digests of all bytes were compared, and equal."""
    pool_bytes: int = 0
    memory_method: str = ""
    group: int = 0
    """Those of one group took turns; memory did not allow for all at once if there are several."""
    sweep: str = ""
    """The sweep it is a point of; empty: the comparison."""
    x: float = 0.0
    options: dict[str, Any] = {}


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    shmem_huge_pages: str
    versions: dict[str, str]
    """By package; empty: not installed."""


class Results(msgspec.Struct):
    """Everything."""

    schema: int
    command: str
    started: str
    """ISO 8601, UTC."""
    took_s: float
    quick: bool
    machine: Machine
    measurements: list[Measurement]


def save(results: Results, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def load(path: Path) -> Results:
    """:raises ValueError: not such a file, or of another version of this program."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} has no results of this program: {error}") from error
    if results.schema != SCHEMA:
        raise ValueError(f"{path} has results of format {results.schema}, this program knows {SCHEMA}")
    return results
