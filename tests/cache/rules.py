"""The rules that keep data safe in a folder. Each is a function that fails if its rule does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from embferry.cache import folder as module
from embferry.cache.entry import Damaged, parse
from embferry.cache.folder import FolderStore

from .samples import file_bytes, found, has, keep, key_of, opened, path_of, sample

Rule = Callable[[Path], None]


def is_removed(store: FolderStore, name: object) -> None:
    """Reads a file that cannot be used: that says so once, and the file is gone."""
    with pytest.raises(Damaged):
        found(store, name)
    assert not os.path.lexists(path_of(Path(store._path), name))
    assert found(store, name) is None


def a_changed_byte_is_noticed(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    raw = bytearray(path_of(tmp / "cache", "a").read_bytes())
    raw[-1] ^= 1
    path_of(tmp / "cache", "a").write_bytes(raw)
    is_removed(store, "a")


def a_file_under_another_name_is_noticed(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    os.rename(path_of(tmp / "cache", "a"), path_of(tmp / "cache", "b"))
    is_removed(store, "b")


def a_short_file_is_noticed(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    os.truncate(path_of(tmp / "cache", "a"), file_bytes("a") - 1)
    is_removed(store, "a")


def a_file_that_is_cut_while_it_is_read_is_noticed(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")

    def parsed(start: bytes, total: int) -> object:
        os.truncate(path_of(tmp / "cache", "a"), file_bytes("a") - 1)
        return parse(start, total)

    with patch.object(module, "parse", parsed):
        is_removed(store, "a")


def a_head_says_all_of_it_once(tmp: Path) -> None:
    """Another form of the same head, such as one with a second tensor, is no head of ours."""
    store = opened(tmp)
    keep(store, "a")
    path = path_of(tmp / "cache", "a")
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    is_removed(store, "a")


def a_symbolic_link_is_not_followed(tmp: Path) -> None:
    store, other = opened(tmp), opened(tmp / "cache")
    keep(other, "a")
    there = path_of(tmp / "cache" / "cache", "a")
    os.symlink(there, path_of(tmp / "cache", "a"))
    is_removed(store, "a")
    assert has(other, "a")


def a_file_of_another_user_is_not_read(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    status = os.stat(path_of(tmp / "cache", "a"))
    with patch.object(module.os, "fstat", _of_another_user(os.fstat, status.st_ino)):
        is_removed(store, "a")


def a_folder_of_another_user_is_refused(tmp: Path) -> None:
    opened(tmp)
    with (
        patch.object(module.os, "fstat", _of_another_user(os.fstat, os.stat(tmp / "cache").st_ino)),
        pytest.raises(PermissionError, match="belongs to another user"),
    ):
        opened(tmp)


def a_folder_that_others_may_use_is_refused(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    for mode in (0o770, 0o740, 0o707, 0o704, 0o711):
        (tmp / "cache").chmod(mode)
        with pytest.raises(PermissionError, match="must be 700"):
            opened(tmp)
        with pytest.raises(PermissionError):
            has(store, "a")
        with pytest.raises(PermissionError):
            keep(store, "b")


def nothing_that_blocks_is_opened(tmp: Path) -> None:
    """A FIFO without a writer would hold its reader for ever."""
    store = opened(tmp)
    os.mkfifo(path_of(tmp / "cache", "a"))
    real = os.open

    def open_nonblocking(path: object, flags: int, *more: object, **options: object) -> int:
        assert flags & os.O_NONBLOCK or not str(path).endswith(module.SUFFIX)
        return real(path, flags, *more, **options)  # type: ignore[arg-type]

    with patch.object(module.os, "open", open_nonblocking):
        is_removed(store, "a")


def only_whole_files_have_a_name(tmp: Path) -> None:
    store = opened(tmp)
    real, seen = os.write, []

    def write(fd: int, data: memoryview) -> int:
        seen.append([path.name for path in (tmp / "cache").iterdir() if path.name.endswith(module.SUFFIX)])
        return real(fd, data[:7])  # as a full pipe or a signal may cut it

    with patch.object(module.os, "write", write):
        keep(store, "a")
    assert seen
    assert not any(seen)
    assert has(store, "a")


def a_file_is_on_disk_before_it_has_its_name(tmp: Path) -> None:
    store, order = opened(tmp), []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        order.append(("fsync", os.fstat(fd).st_size))
        fsync(fd)

    def noted_rename(*names: object, **folders: object) -> None:
        order.append(("rename", 0))
        rename(*names, **folders)  # type: ignore[arg-type]

    with patch.object(module.os, "fsync", noted_fsync), patch.object(module.os, "rename", noted_rename):
        size = keep(store, "a")
    assert order == [("fsync", size), ("rename", 0)]


def the_least_recently_used_is_evicted(tmp: Path) -> None:
    store = opened(tmp, 3 * file_bytes("a"))
    for at, name in enumerate("abc"):
        keep(store, name)
        os.utime(path_of(tmp / "cache", name), (at, at))
    assert has(store, "a")  # counts as used now
    keep(store, "d")
    assert [has(store, name) for name in "abcd"] == [True, False, True, True]


def a_new_process_knows_the_order_of_use(tmp: Path) -> None:
    for at, name in enumerate("cab"):
        keep(opened(tmp), name)
        os.utime(path_of(tmp / "cache", name), (at, at))
    store = opened(tmp, 3 * file_bytes("a"))
    keep(store, "d")
    assert [has(store, name) for name in "cabd"] == [False, True, True, True]


def a_use_by_another_process_counts(tmp: Path) -> None:
    for at, name in enumerate("ab"):
        keep(opened(tmp), name)
        os.utime(path_of(tmp / "cache", name), (at, at))
    store = opened(tmp, 2 * file_bytes("a"))  # has seen the order a, b
    assert has(opened(tmp), "a")
    keep(store, "c")
    assert [has(store, name) for name in "abc"] == [True, False, True]


def the_bound_holds(tmp: Path) -> None:
    store = opened(tmp, 3 * file_bytes("a"))
    for name in range(10):
        keep(store, name)
        assert sum(path.stat().st_size for path in (tmp / "cache").iterdir()) <= 3 * file_bytes("a")
    assert has(store, 9)


def files_of_others_are_left_alone(tmp: Path) -> None:
    opened(tmp)
    strangers = ["notes.txt", "model.safetensors", key_of("a") + ".safetensors.bak", "A" * 64 + ".safetensors"]
    for name in strangers:
        (tmp / "cache" / name).write_bytes(b"x" * 10_000)
        os.utime(tmp / "cache" / name, (0, 0))
    store = opened(tmp, file_bytes("a"))
    for name in "abc":
        keep(store, name)
    store.prune(0)
    assert sorted(path.name for path in (tmp / "cache").iterdir()) == sorted(strangers)


def a_file_in_place_of_a_damaged_one_is_not_removed(tmp: Path) -> None:
    """Another process may have put a good file there between our reading and our removal."""
    store = opened(tmp)
    keep(store, "a")
    path, good = path_of(tmp / "cache", "a"), opened(tmp)

    def parsed(start: bytes, total: int) -> object:
        path.unlink()
        keep(good, "a")
        raise Damaged("the old one")

    with patch.object(module, "parse", parsed), pytest.raises(Damaged):
        found(store, "a")
    assert has(store, "a")


def the_same_embedding_is_written_once(tmp: Path) -> None:
    store = opened(tmp)
    keep(store, "a")
    entry, data = sample("a", seed=1)
    assert store.write(entry, data) == 0
    assert has(store, "a")


RULES: tuple[Rule, ...] = (
    a_changed_byte_is_noticed,
    a_file_under_another_name_is_noticed,
    a_short_file_is_noticed,
    a_file_that_is_cut_while_it_is_read_is_noticed,
    a_head_says_all_of_it_once,
    a_symbolic_link_is_not_followed,
    a_file_of_another_user_is_not_read,
    a_folder_of_another_user_is_refused,
    a_folder_that_others_may_use_is_refused,
    nothing_that_blocks_is_opened,
    only_whole_files_have_a_name,
    a_file_is_on_disk_before_it_has_its_name,
    the_least_recently_used_is_evicted,
    a_new_process_knows_the_order_of_use,
    a_use_by_another_process_counts,
    the_bound_holds,
    files_of_others_are_left_alone,
    a_file_in_place_of_a_damaged_one_is_not_removed,
    the_same_embedding_is_written_once,
)


def _of_another_user(fstat: Callable[[int], os.stat_result], inode: int) -> Callable[[int], os.stat_result]:
    """Returns an ``fstat`` to which one file belongs to another user."""

    def seen(fd: int) -> os.stat_result:
        status = fstat(fd)
        if status.st_ino != inode:
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])

    return seen
