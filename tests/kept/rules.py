"""The rules that keep what has arrived safe. Each is a function that fails if its rule does not hold."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from embferry.kept import file as file_module
from embferry.kept import folder as folder_module
from embferry.protocol.layout import Layout
from tests.transfer.conftest import LAYOUT, embedding

from .moments import receives_at_every_moment, receives_late_chunk_of_another_content
from .workers import (
    DIGEST,
    TOKENS,
    a_name,
    die,
    holds,
    left_by_a_killed_one,
    names,
    ranges,
    receive,
    taken,
    worker,
)

Rule = Callable[[Path], None]


def nothing(place: Path, **options: object) -> None:
    """Looks for an embedding twice: there is nothing that can be used, and no file is left."""
    for _ in range(2):
        assert taken(place, **options) is None  # type: ignore[arg-type]
    assert names(place) == []


# What is read


def a_file_says_what_is_there_whenever_its_process_is_killed(place: Path) -> None:
    receives_at_every_moment(place)


def a_chunk_of_another_content_is_not_recorded(place: Path) -> None:
    receives_late_chunk_of_another_content(place)


def what_has_arrived_is_taken_over(place: Path) -> None:
    left_by_a_killed_one(place, (0, 8), (16, 4))
    file = taken(place)
    assert ranges(file) == [(0, 8), (16, 20)]
    assert holds(file)


def another_content_is_not_taken(place: Path) -> None:
    path = left_by_a_killed_one(place)
    path.rename(place / a_name(digest=b"another"))
    nothing(place, digest=b"another")


def another_layout_is_not_taken(place: Path) -> None:
    """The fields have other names."""
    other = Layout(LAYOUT.fields[::-1])
    path = left_by_a_killed_one(place)
    path.rename(place / a_name().replace(a_name()[:32], folder_module.Head(other, DIGEST, TOKENS).key))
    nothing(place, layout=other)


def a_changed_row_is_noticed(place: Path) -> None:
    path = left_by_a_killed_one(place, (0, TOKENS))
    head = folder_module.Head(LAYOUT, DIGEST, TOKENS)
    with path.open("r+b") as raw:
        raw.seek(head.rows_at + 3)
        byte = raw.read(1)[0]
        raw.seek(head.rows_at + 3)
        raw.write(bytes([byte ^ 1]))
    nothing(place)


def a_short_file_is_noticed(place: Path) -> None:
    """Its mapping would end the process that reads it."""
    for size in (0, 100, 300, folder_module.Head(LAYOUT, DIGEST, TOKENS).size - 1):
        os.truncate(left_by_a_killed_one(place), size)
        nothing(place)


# Locks


def a_file_in_use_is_not_taken(place: Path) -> None:
    first = worker(place)
    file = first.make(DIGEST, TOKENS)
    assert file is not None
    receive(file, embedding(TOKENS), 0, 8)
    assert taken(place) is None
    assert len(names(place)) == 1
    die(file)
    second = worker(place)
    taker = second.take(DIGEST, TOKENS)
    assert taker is not None
    assert taken(place) is None
    taker.discard()
    nothing(place)


def a_file_that_is_gone_before_it_is_locked_is_not_taken(place: Path) -> None:
    """Another worker has taken it over: it is done with it, or uses it. Or another file has its name."""
    other = left_by_a_killed_one(place).rename(place.parent / "other")
    for away in (Path.unlink, lambda path: path.rename(f"{path}"[:-1] + "1"), other.replace):
        path = left_by_a_killed_one(place)
        late = partial(_away_then_locked, file_module.fcntl.flock, partial(away, path))
        with patch.object(file_module.fcntl, "flock", late):
            assert taken(place) is None
        for name in names(place):
            (place / name).unlink()


def _away_then_locked(lock: Callable[[int, int], None], away: Callable[[], object], fd: int, how: int) -> None:
    away()
    lock(fd, how)


# How often, and how many


def a_file_is_taken_twice_and_no_more(place: Path) -> None:
    left_by_a_killed_one(place)
    for _ in range(2):
        file = taken(place)
        assert ranges(file) == [(0, 8)]
        assert file is not None
        die(file)
    nothing(place)


def a_use_counts_before_the_file_is_read(place: Path) -> None:
    """If reading it is what kills the workers, it does so twice at most."""
    left_by_a_killed_one(place)

    def killed(fd: int, head: object) -> None:
        os.close(fd)
        raise KeyboardInterrupt

    lives = 0
    for _ in range(5):
        with patch.object(folder_module, "describe", killed):
            try:
                taken(place)
            except KeyboardInterrupt:
                lives += 1
    assert lives == 2
    nothing(place)


def embeddings_of_killed_workers_are_bounded(place: Path) -> None:
    """The least recently used go, when the next embedding is made; those in use stay."""
    paths = [left_by_a_killed_one(place, seed=n, digest=f"digest {n}".encode()) for n in range(4)]
    for at, path in enumerate(paths):
        os.utime(path, ns=(at, at))
    os.utime(paths[0], ns=(9, 9))
    living = worker(place)
    in_use = living.make(DIGEST, TOKENS)
    assert in_use is not None
    one = paths[0].stat().st_size
    by = worker(place, max_bytes=2 * one)
    made = by.make(b"another", TOKENS)
    assert made is not None
    left = [path for path in paths if path.exists()]
    assert left == [paths[0], paths[3]]
    assert len(names(place)) == 4
    assert by.dropped["room"] == 2
    die(in_use)


def a_file_has_memory_for_every_byte(place: Path) -> None:
    """A byte of a mapping for which there is none kills the process that writes it."""
    by = worker(place)
    made = by.make(DIGEST, 5000)
    assert made is not None
    (name,) = names(place)
    path = place / name
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    receive(made, embedding(5000), 0, 8)
    die(made)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8192])
    os.truncate(path, size)  # a hole at its end
    file = taken(place, tokens=5000)
    assert ranges(file) == [(0, 8)]
    (name,) = names(place)
    assert (place / name).stat().st_blocks * 512 >= size


# Strange files


def strange_files_are_removed(place: Path) -> None:
    """A link, a pipe, a socket, noise, an empty file, one of another mode, one with two names."""
    target = place.parent / "target"
    target.write_bytes(left_by_a_killed_one(place).read_bytes())
    for name in names(place):
        (place / name).unlink()
    path = place / a_name()

    def a_socket() -> None:
        with socket.socket(socket.AF_UNIX) as at:
            at.bind(str(path))

    def readable_by_all() -> None:
        left_by_a_killed_one(place).chmod(0o644)

    def two_names() -> None:
        os.link(left_by_a_killed_one(place), place.parent / "second name")

    for make in (
        lambda: path.symlink_to(target),
        lambda: path.symlink_to(place.parent / "nowhere"),
        lambda: os.mkfifo(path, 0o600),
        a_socket,
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(os.urandom(100_000)),
        readable_by_all,
        two_names,
    ):
        make()
        if path.exists() and not path.is_symlink() and stat.S_ISREG(path.stat().st_mode):
            path.chmod(0o600)
        nothing(place)
    assert target.exists()


def files_of_another_user_are_not_used(place: Path) -> None:
    left_by_a_killed_one(place)
    found = os.fstat

    def foreign(fd: int) -> os.stat_result:
        status = found(fd)
        if stat.S_ISDIR(status.st_mode):
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])

    with patch.object(file_module.os, "fstat", foreign):
        nothing(place)


def a_folder_that_others_may_use_is_refused(place: Path) -> None:
    left_by_a_killed_one(place)
    place.chmod(0o750)
    by = worker(place)
    assert by.take(DIGEST, TOKENS) is None
    assert by.make(DIGEST, TOKENS) is None
    assert by.unkept == 1
    place.chmod(0o700)
    assert len(names(place)) == 1


def a_folder_that_is_a_link_is_refused(place: Path) -> None:
    left_by_a_killed_one(place)
    link = place.parent / "link"
    link.symlink_to(place)
    assert taken(link) is None
    assert worker(link).make(DIGEST, TOKENS) is None


def other_names_are_left_alone(place: Path) -> None:
    path = left_by_a_killed_one(place)
    strange = [".in-use", path.name + "x", path.name[:-1] + "7", path.name.upper(), "x" + path.name]
    path.rename(place / strange[0])
    for name in strange[1:]:
        (place / name).write_bytes(b"")
    assert taken(place) is None
    assert worker(place, max_bytes=1).make(b"another", TOKENS) is not None
    assert set(strange) <= set(names(place))


RULES: list[Rule] = [
    a_file_says_what_is_there_whenever_its_process_is_killed,
    a_chunk_of_another_content_is_not_recorded,
    what_has_arrived_is_taken_over,
    another_content_is_not_taken,
    another_layout_is_not_taken,
    a_changed_row_is_noticed,
    a_short_file_is_noticed,
    a_file_in_use_is_not_taken,
    a_file_that_is_gone_before_it_is_locked_is_not_taken,
    a_file_is_taken_twice_and_no_more,
    a_use_counts_before_the_file_is_read,
    embeddings_of_killed_workers_are_bounded,
    a_file_has_memory_for_every_byte,
    strange_files_are_removed,
    files_of_another_user_are_not_used,
    a_folder_that_others_may_use_is_refused,
    a_folder_that_is_a_link_is_refused,
    other_names_are_left_alone,
]
