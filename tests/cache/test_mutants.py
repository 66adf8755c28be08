"""Every rule of a folder holds, and every check behind one is needed: without it, its rule does not hold."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pytest.outcomes import Failed

from embferry.cache import entry, folder
from embferry.cache.entry import Entry
from embferry.cache.folder import FolderStore, Kept

from . import rules
from .rules import RULES, Rule

Mutate = Callable[[pytest.MonkeyPatch], None]
BROKEN = (AssertionError, Failed, OSError)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_holds(rule: Rule, tmp_path: Path) -> None:
    rule(tmp_path)


def no_digest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "verify", lambda entry, data: None)


def any_key(patch: pytest.MonkeyPatch) -> None:
    real = folder._head

    def head(fd: int, key: str) -> tuple[Entry, int]:
        found = entry.parse(os.pread(fd, entry.MAX_HEAD, 0), os.fstat(fd).st_size)
        return real(fd, found[0].key)

    patch.setattr(folder, "_head", head)


def any_length(patch: pytest.MonkeyPatch) -> None:
    """The bytes that are missing then stay those of the memory."""
    patch.setattr(folder, "parse", lambda start, total: entry.parse(start, _claimed(start)))
    patch.setattr(folder.os, "preadv", _never_ends(os.preadv))
    no_digest(patch)


def an_end_is_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder.os, "preadv", _never_ends(os.preadv))
    no_digest(patch)


def any_form_of_head(patch: pytest.MonkeyPatch) -> None:
    class Loose(Entry):
        def head(self) -> Any:
            return _Equal(super().head())

    patch.setattr(entry, "Entry", Loose)


def links_are_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder.os, "open", _without(os.O_NOFOLLOW))


def opening_may_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder.os, "O_NONBLOCK", 0)


def any_user(patch: pytest.MonkeyPatch) -> None:
    class Anybody(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    patch.setattr(folder.os, "geteuid", lambda: Anybody())


def any_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_OTHERS", 0)


def only_writable_by_others_is_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_OTHERS", 0o022)


def written_in_place(patch: pytest.MonkeyPatch) -> None:
    def write(at: int, name: str, head: bytes, data: memoryview) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=at)
        for part in (memoryview(head), data):
            done = 0
            while done < len(part):
                done += os.write(fd, part[done:])
        os.fsync(fd)
        os.close(fd)

    patch.setattr(folder, "_write", write)


def no_fsync(patch: pytest.MonkeyPatch) -> None:
    source = textwrap.dedent(inspect.getsource(folder._write))
    assert source.count("os.fsync(fd)") == 1
    scope = dict(vars(folder))
    exec(source.replace("os.fsync(fd)", "pass"), scope)
    patch.setattr(folder, "_write", scope["_write"])


def a_use_is_not_noted(patch: pytest.MonkeyPatch) -> None:
    real = os.utime
    patch.setattr(folder.os, "utime", lambda path, *times, **more: real(path, *times) if times else None)


def what_was_seen_first_is_evicted(patch: pytest.MonkeyPatch) -> None:
    def evict(store: FolderStore, at: int, kept: Kept) -> None:
        os.unlink(kept.name, dir_fd=at)
        store.nbytes -= kept.nbytes

    patch.setattr(FolderStore, "_evict", evict)


def the_oldest_is_not_known(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_used", lambda kept: -kept.used_ns)


def no_room_is_made(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FolderStore, "_make_room", lambda store, at, size: None)


def every_file_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_NAME", re.compile(".*"))


def names_may_go_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_NAME", re.compile(r"[0-9a-f]{64}\.safetensors"))


def whatever_is_there_is_removed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder.os.path, "samestat", lambda one, other: True)


def written_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_use", lambda at, name: False)


MUTANTS: list[tuple[Mutate, Rule]] = [
    (no_digest, rules.a_changed_byte_is_noticed),
    (any_key, rules.a_file_under_another_name_is_noticed),
    (any_length, rules.a_short_file_is_noticed),
    (an_end_is_no_end, rules.a_file_that_is_cut_while_it_is_read_is_noticed),
    (any_form_of_head, rules.a_head_says_all_of_it_once),
    (links_are_followed, rules.a_symbolic_link_is_not_followed),
    (opening_may_block, rules.nothing_that_blocks_is_opened),
    (any_user, rules.a_file_of_another_user_is_not_read),
    (any_user, rules.a_folder_of_another_user_is_refused),
    (any_mode, rules.a_folder_that_others_may_use_is_refused),
    (only_writable_by_others_is_refused, rules.a_folder_that_others_may_use_is_refused),
    (written_in_place, rules.only_whole_files_have_a_name),
    (no_fsync, rules.a_file_is_on_disk_before_it_has_its_name),
    (a_use_is_not_noted, rules.the_least_recently_used_is_evicted),
    (the_oldest_is_not_known, rules.a_new_process_knows_the_order_of_use),
    (what_was_seen_first_is_evicted, rules.a_use_by_another_process_counts),
    (no_room_is_made, rules.the_bound_holds),
    (every_file_is_ours, rules.files_of_others_are_left_alone),
    (names_may_go_on, rules.files_of_others_are_left_alone),
    (whatever_is_there_is_removed, rules.a_file_in_place_of_a_damaged_one_is_not_removed),
    (written_again, rules.the_same_embedding_is_written_once),
]


def test_every_rule_has_a_mutant() -> None:
    assert {rule for _, rule in MUTANTS} == set(RULES)


@pytest.mark.parametrize(("mutate", "rule"), MUTANTS, ids=lambda part: part.__name__)
def test_a_rule_does_not_hold_without_its_check(
    mutate: Mutate, rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(BROKEN):
        rule(tmp_path)


class _Equal(bytes):
    """Bytes that equal all others."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


def _claimed(start: bytes) -> int:
    """Returns the length that a file should have."""
    head = 8 + int.from_bytes(start[:8], "little")
    offsets = re.findall(rb'"data_offsets":\[\d+,(\d+)\]', start)
    return head + max(map(int, offsets))


def _never_ends(real: Callable[..., int]) -> Callable[..., int]:
    """Returns a ``preadv`` that fills nothing where the file ends, and says that it has."""
    return lambda fd, rooms, at: real(fd, rooms, at) or len(rooms[0])


def _without(flag: int) -> Callable[..., int]:
    real = os.open
    return lambda path, flags, *more, **options: real(path, flags & ~flag, *more, **options)
