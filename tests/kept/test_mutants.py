"""Every rule holds, and every check behind one is needed: without it, its rule does not hold."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embferry.kept import file, folder, form
from embferry.kept.file import KeptFile
from embferry.kept.folder import KeptFolder
from embferry.kept.form import Head, Record
from embferry.kept.sink import KeptSink
from embferry.protocol.commands import Verify
from embferry.transfer.sinks import GatherSink

from . import rules
from .rules import RULES, Rule

Mutate = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_holds(rule: Rule, place: Path) -> None:
    rule(place)


def without(patch: pytest.MonkeyPatch, module: ModuleType, name: str, line: str, instead: str = "pass") -> None:
    """Replaces a line of a function of a module."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(line) == 1, source
    scope = dict(vars(module))
    exec(source.replace(line, instead), scope)
    patch.setattr(module, name, scope[name])


def recorded_before_its_rows_are_here(patch: pytest.MonkeyPatch) -> None:
    def verify(self: KeptSink, chunk: Verify, total: int) -> Generator[None, None, bool]:
        if self._file is not None and chunk.checksum is not None:
            self._record(self._file, Record(chunk.offset, chunk.length, chunk.checksum))
        return (yield from GatherSink.verify(self, chunk, total))

    patch.setattr(KeptSink, "verify", verify)
    patch.setattr(KeptSink, "deliver", GatherSink.deliver)


def recorded_as_soon_as_it_matches(patch: pytest.MonkeyPatch) -> None:
    def verify(self: KeptSink, chunk: Verify, total: int) -> Generator[None, None, bool]:
        good = yield from GatherSink.verify(self, chunk, total)
        if good and self._file is not None and chunk.checksum is not None:
            self._record(self._file, Record(chunk.offset, chunk.length, chunk.checksum))
        return good

    patch.setattr(KeptSink, "verify", verify)
    patch.setattr(KeptSink, "deliver", GatherSink.deliver)


def half_a_record_counts(patch: pytest.MonkeyPatch) -> None:
    without(patch, form, "read_records", "record.encoded(index) != raw or", "")
    patch.setattr(folder, "describe", _describe_with(form.read_records))
    no_rows_are_compared(patch)


def no_rows_are_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Record, "matches", lambda self, layout, arrays: True)


def nothing_is_recorded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeptSink, "deliver", GatherSink.deliver)


def records_are_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "describe", lambda fd, head: ())


def the_head_says_no_content(patch: pytest.MonkeyPatch) -> None:
    _head_without(patch, "content_digest", b"any")


def the_head_says_no_layout(patch: pytest.MonkeyPatch) -> None:
    _head_without(patch, "layout", rules.LAYOUT)
    no_rows_are_compared(patch)


def any_size(patch: pytest.MonkeyPatch) -> None:
    without(patch, file, "describe", "os.fstat(fd).st_size != head.size or ", "")
    patch.setattr(folder, "describe", file.describe)
    patch.setattr(folder, "allocate", _refusing)


def locks_are_not_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file.fcntl, "flock", lambda fd, how: None)


def the_file_under_the_name_may_be_another(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file.os.path, "samestat", lambda one, other: True)


def uses_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_taken_once_more", lambda at, name: name)


def a_use_counts_at_its_end(patch: pytest.MonkeyPatch) -> None:
    count, adopt = folder._taken_once_more, KeptFolder._adopt

    def late(self: KeptFolder, fd: int, name: str, head: Head) -> KeptFile:
        found = adopt(self, fd, name, head)
        with self._folder() as at:
            count(at, name)
        return found

    patch.setattr(folder, "_taken_once_more", lambda at, name: name)
    patch.setattr(KeptFolder, "_adopt", late)


def no_room_is_made(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KeptFolder, "_trim", lambda self, at: None)


def the_newest_go(patch: pytest.MonkeyPatch) -> None:
    look = folder._look_through
    patch.setattr(folder, "_look_through", lambda at: (one._replace(used_ns=-one.used_ns) for one in look(at)))


def memory_is_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "allocate", lambda fd, size: os.truncate(fd, size))


def links_are_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file, "_OPEN", file._OPEN & ~os.O_NOFOLLOW)


def opening_a_strange_file_is_an_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file, "_NO_FILE", set())


def any_kind_of_file(patch: pytest.MonkeyPatch) -> None:
    without(patch, file, "claim", 'raise Unusable("it has another name")')
    patch.setattr(folder, "claim", file.claim)


def any_user(patch: pytest.MonkeyPatch) -> None:
    without(patch, file, "claim", " or found.st_uid != os.geteuid()", "")
    patch.setattr(folder, "claim", file.claim)


def any_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_OTHERS", 0)


def a_linked_folder_will_do(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder.os, "O_NOFOLLOW", 0)


def every_file_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_NAME", re.compile(".*"))


def names_may_go_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "_NAME", re.compile(folder._NAME.pattern.removesuffix(r"\Z")))


MUTANTS: list[tuple[Mutate, Rule]] = [
    (recorded_before_its_rows_are_here, rules.a_file_says_what_is_there_whenever_its_process_is_killed),
    (half_a_record_counts, rules.a_file_says_what_is_there_whenever_its_process_is_killed),
    (nothing_is_recorded, rules.a_file_says_what_is_there_whenever_its_process_is_killed),
    (recorded_as_soon_as_it_matches, rules.a_chunk_of_another_content_is_not_recorded),
    (records_are_not_read, rules.what_has_arrived_is_taken_over),
    (the_head_says_no_content, rules.another_content_is_not_taken),
    (the_head_says_no_layout, rules.another_layout_is_not_taken),
    (no_rows_are_compared, rules.a_changed_row_is_noticed),
    (any_size, rules.a_short_file_is_noticed),
    (locks_are_not_asked, rules.a_file_in_use_is_not_taken),
    (locks_are_not_asked, rules.embeddings_of_killed_workers_are_bounded),
    (the_file_under_the_name_may_be_another, rules.a_file_that_is_gone_before_it_is_locked_is_not_taken),
    (uses_are_not_counted, rules.a_file_is_taken_twice_and_no_more),
    (a_use_counts_at_its_end, rules.a_use_counts_before_the_file_is_read),
    (no_room_is_made, rules.embeddings_of_killed_workers_are_bounded),
    (the_newest_go, rules.embeddings_of_killed_workers_are_bounded),
    (memory_is_not_asked_for, rules.a_file_has_memory_for_every_byte),
    (links_are_followed, rules.strange_files_are_removed),
    (opening_a_strange_file_is_an_error, rules.strange_files_are_removed),
    (any_kind_of_file, rules.strange_files_are_removed),
    (any_user, rules.files_of_another_user_are_not_used),
    (any_mode, rules.a_folder_that_others_may_use_is_refused),
    (a_linked_folder_will_do, rules.a_folder_that_is_a_link_is_refused),
    (every_file_is_ours, rules.other_names_are_left_alone),
    (names_may_go_on, rules.other_names_are_left_alone),
]


def test_every_rule_has_a_mutant() -> None:
    assert {rule for _, rule in MUTANTS} == set(RULES)


@pytest.mark.parametrize(("mutate", "rule"), MUTANTS, ids=lambda part: part.__name__)
def test_a_rule_does_not_hold_without_its_check(
    mutate: Mutate, rule: Rule, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises((AssertionError, OSError)):
        rule(place)


def _describe_with(read: Callable[..., Any]) -> Callable[..., Any]:
    return lambda fd, head: tuple(read(file.records_in(fd, head), head.total_tokens))


def _head_without(patch: pytest.MonkeyPatch, part: str, value: object) -> None:
    """Makes the bytes of a head the same for every value of one of its parts. Names still differ."""
    real = Head.encoded.func  # type: ignore[attr-defined]

    def encoded(self: Head) -> bytes:
        parts = {"layout": self.layout, "content_digest": self.content_digest, "total_tokens": self.total_tokens}
        return bytes(real(Head(**(parts | {part: value}))))

    key = Head.key.func  # type: ignore[attr-defined]
    patch.setattr(Head, "key", property(lambda self: key(_Plain(real(self)))))
    patch.setattr(Head, "encoded", property(encoded))


class _Plain:
    """A head of which only the bytes are known."""

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded


def _refusing(fd: int, size: int) -> None:
    """Does as a file system that has no room for what is missing; a mapping of it would end this process."""
    assert os.fstat(fd).st_size == size, "a file of the wrong size would be mapped"
