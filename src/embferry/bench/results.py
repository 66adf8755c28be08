"""The JSON file that a benchmark writes: raw samples and where they were taken. All reports are computed from it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from .machine import Machine

SCHEMA = 2

MAX_FILE_BYTES = 256 << 20
"""Bytes of the largest file that is read. A run of ten thousand requests has a few megabytes."""

Progress = Callable[[str, int], None]
"""Called with what is being done now, and how many rounds or requests have ended since the last call."""


class Results(msgspec.Struct, kw_only=True, tag_field="benchmark"):
    """Common part of the results of all benchmarks."""

    schema: int = SCHEMA
    command: str
    started: str
    """ISO 8601, UTC."""
    took_s: float = 0.0
    quick: bool = False
    complete: bool = False
    """False if the run was interrupted; what was measured before that is there."""
    machine: Machine
    load_before: tuple[float, float, float] | None = None
    """Load averages over 1, 5 and 15 minutes when the run began: how busy other work kept the machine."""
    load_after: tuple[float, float, float] | None = None

    @classmethod
    def begin(cls, machine: Machine, *, quick: bool = False) -> Self:
        command, started = shlex.join(["embferry", *sys.argv[1:]]), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(command=command, started=started, machine=machine, quick=quick, load_before=os.getloadavg())

    @contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Saves what is measured inside. Ctrl-C and SIGTERM end the block and keep what was measured by then."""
        path.parent.mkdir(parents=True, exist_ok=True)
        before, began = signal.signal(signal.SIGTERM, signal.default_int_handler), time.monotonic()
        try:
            yield
            self.complete = True
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
        self.took_s, self.load_after = round(time.monotonic() - began, 1), os.getloadavg()
        save(self, path)


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes")
    return data


R = TypeVar("R", bound=Results)


def save(results: Results, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def load(path: Path, kind: type[R]) -> R:
    """Reads results that :func:`save` has written.

    Raises:
        ValueError: the file has no results of this kind, or was written by another version of this program.
    """
    try:
        results = msgspec.json.decode(read_file(path), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path} has no results of this benchmark in format {SCHEMA}: {error}") from error
    if results.schema != SCHEMA:
        raise ValueError(f"{path} has results in format {results.schema}; this version reads format {SCHEMA}")
    return results
