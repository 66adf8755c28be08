"""Language workers as far as a folder knows them: they receive embeddings into files, and are killed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np

from embferry.kept import folder as module
from embferry.kept.file import KeptFile
from embferry.kept.folder import KeptFolder
from embferry.kept.form import Head, Record
from embferry.memory.buffers import checksum
from embferry.protocol.layout import Layout
from embferry.transfer.fields import Array, Fields
from tests.transfer.conftest import LAYOUT, embedding

DIGEST = b"digest"
TOKENS = 40
ROOMY = 1 << 30
Worker = KeptFolder


def worker(place: Path, *, max_bytes: int = ROOMY, layout: Layout = LAYOUT) -> Worker:
    return KeptFolder(place, max_bytes, layout)


def record(rows: Fields, offset: int, length: int) -> Record:
    """Returns the record of a chunk as its sender says it."""
    parts = (np.ascontiguousarray(rows[f.name][offset : offset + length]).data.cast("B") for f in LAYOUT.fields)
    return Record(offset, length, checksum(parts).to_bytes(8))


def receive(file: KeptFile, rows: Fields, offset: int, length: int) -> None:
    """Receives a chunk."""
    for name, array in file.arrays.items():
        array[offset : offset + length] = rows[name][offset : offset + length]
    file.add(record(rows, offset, length))


def die(file: KeptFile) -> None:
    """Kills the process of a file: the kernel releases its lock, and nothing else happens."""
    fcntl.flock(file._fd, fcntl.LOCK_UN)


def left_by_a_killed_one(
    place: Path, *chunks: tuple[int, int], seed: int = 0, digest: bytes = DIGEST, tokens: int = TOKENS
) -> Path:
    """Kills a worker that has received some chunks. Returns its file."""
    by = worker(place)
    file = by.make(digest, tokens)
    assert file is not None
    for chunk in chunks or ((0, 8),):
        receive(file, embedding(tokens, seed), *chunk)
    die(file)
    (name,) = by._files
    return place / name


def taken(place: Path, digest: bytes = DIGEST, tokens: int = TOKENS, layout: Layout = LAYOUT) -> KeptFile | None:
    """Returns what the next worker takes over."""
    return worker(place, layout=layout).take(digest, tokens)


def ranges(file: KeptFile | None) -> list[tuple[int, int]]:
    return [] if file is None else list(file.ranges)


def holds(file: KeptFile | None, seed: int = 0, tokens: int = TOKENS) -> bool:
    """Returns whether the tokens that a file claims are those of the embedding."""
    rows: Fields = embedding(tokens, seed)
    arrays: dict[str, Array] = {} if file is None else file.arrays
    return all(np.array_equal(a[x:y], rows[name][x:y]) for x, y in ranges(file) for name, a in arrays.items())


def names(place: Path) -> list[str]:
    """Returns the files in the folder."""
    return sorted(os.listdir(place)) if place.exists() else []


def a_name(seed: int = 0, digest: bytes = DIGEST, tokens: int = TOKENS) -> str:
    """Returns a name that a worker that looks for the embedding looks at."""
    name = f"{Head(LAYOUT, digest, tokens).key}-{seed:016x}-0"
    assert module._NAME.match(name)
    return name
