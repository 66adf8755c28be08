"""The command on real files: the diff, the question, the files it writes or leaves, and its exit status."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.migrate import run

CODE = "import embferry\n\nif r.needs_continuation:  # more\n    r.init_continuation()\n"
NEW_CODE = "import embferry\n\nif r.needs_resume:  # more\n    r.resume_transfer()\n"
SCRIPT = 'grep "continuation" logs/\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "loop.py").write_text(CODE)
    (tmp_path / "app" / "find.sh").write_text(SCRIPT)
    (tmp_path / "app" / "find.sh").chmod(0o750)
    (tmp_path / "app" / "clean.py").write_text("x = 1\n")
    return tmp_path


def called(*words: object, answer: str = "") -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    outcome = CliRunner().invoke(app, ["migrate", *map(str, words)], input=answer)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_the_diff_is_shown_before_the_question(tree: Path) -> None:
    before = contents(tree)
    status, out, err = called(tree, answer="n\n")
    assert status == 1
    assert contents(tree) == before
    assert "-if r.needs_continuation:  # more\n-    r.init_continuation()\n" in out
    assert "+if r.needs_resume:  # more\n+    r.resume_transfer()\n" in out
    assert '-grep "continuation" logs/\n+grep "resume" logs/\n' in out
    assert "Write 2 files?" in err


@pytest.mark.parametrize(("flags", "answer"), [(("--yes",), ""), ((), "y\n"), ((), "Yes\n")])
def test_it_writes_when_told_to(tree: Path, flags: tuple[str, ...], answer: str) -> None:
    status, _, err = called(tree, *flags, answer=answer)
    assert (status, "2 files written" in err) == (0, True)
    assert (tree / "app" / "loop.py").read_text() == NEW_CODE
    assert (tree / "app" / "find.sh").read_text() == 'grep "resume" logs/\n'
    assert (tree / "app" / "find.sh").stat().st_mode & 0o777 == 0o750
    assert sorted(contents(tree)) == ["app/clean.py", "app/find.sh", "app/loop.py"]
    after = contents(tree)
    assert called(tree, "--yes")[:2] == (0, "")
    assert called(tree, "--check")[0] == 0
    assert contents(tree) == after


def test_without_an_answer_nothing_is_written(tree: Path) -> None:
    before = contents(tree)
    assert called(tree)[0] == 1
    assert contents(tree) == before


def test_check_and_dry_run_write_nothing(tree: Path) -> None:
    before = contents(tree)
    assert called(tree, "--check")[0] == 1
    status, out, _ = called(tree, "--dry-run", "--yes")
    assert (status, out.count("+++ b/")) == (0, 2)
    assert contents(tree) == before


def test_check_fails_and_says_where_while_a_file_of_the_system_has_the_old_word(tree: Path) -> None:
    own = tree / "disaggregation"
    own.mkdir()
    code = "# continuation\nis_continuation = 1\nx = is_continuation\nraise Error('a line continuation')\n"
    (own / "utils.py").write_text(code)
    (own / "README.md").write_text("It needs\ncontinuation.\n")
    assert called(tree, "--yes")[0] == 0
    assert (own / "utils.py").read_text() == code.replace("# continuation", "# resume")
    status, out, err = called(tree, "--check")
    assert (status, out) == (1, "")
    listed = [line.removeprefix(f"doubtful: {own}/") for line in err.splitlines() if line.startswith("doubtful: ")]
    places = ["README.md:2", "utils.py:2", "utils.py:3", "utils.py:4"]
    assert [line.partition(": ")[0] for line in listed] == places, "every line that grep finds"
    (own / "utils.py").write_text("x = 1\n")
    (own / "README.md").unlink()
    assert called(tree, "--check")[0] == 0


def test_a_missing_path_is_wrong_usage(tree: Path) -> None:
    status, _, err = called(tree, tree / "none")
    assert (status, str(tree / "none") in err) == (2, True)


def test_files_that_cannot_be_handled_are_named_and_the_others_written(tree: Path) -> None:
    (tree / "old.py").write_bytes(b"print 'needs_continuation'\n")
    (tree / "bytes.py").write_bytes(b"import embferry\nr.partial_data # \xff\n")
    (tree / "utf16.sh").write_bytes("partial_data".encode("utf-16") + b"partial_data")
    (tree / "huge.txt").write_bytes(b"partial_data" + b"x" * run.MAX_BYTES)
    (tree / "huge-and-clean.txt").write_bytes(b"x" * (run.MAX_BYTES + 1))
    status, _, err = called(tree, "--yes")
    assert status == 3
    assert (tree / "app" / "loop.py").read_text() == NEW_CODE
    assert sorted(line.split(": ")[1].rpartition("/")[2] for line in err.splitlines() if line.startswith("left: ")) == [
        "bytes.py", "huge.txt", "old.py", "utf16.sh",
    ]  # fmt: skip
    assert (tree / "old.py").read_bytes() == b"print 'needs_continuation'\n"


def test_bytes_in_an_unknown_encoding_stay(tree: Path) -> None:
    script = tree / "latin.sh"
    script.write_bytes(b"# caf\xe9\r\ngrep continuation logs/")
    status, out, _ = called(script, "--yes")
    assert status == 0
    assert script.read_bytes() == b"# caf\xe9\r\ngrep resume logs/"
    assert "caf\\xe9" in out
    assert out.count("\\ No newline at end of file") == 2


def test_links_are_not_replaced(tree: Path) -> None:
    outside = tree / "outside.py"
    outside.write_text(CODE)
    inside = tree / "app" / "link.py"
    inside.symlink_to(outside)
    (tree / "app" / "around").symlink_to(tree / "app", target_is_directory=True)
    (tree / "app" / "nowhere.py").symlink_to(tree / "none")
    assert called(tree / "app", "--yes")[0] == 0
    assert outside.read_text() == CODE
    assert called(inside, "--yes")[0] == 0
    assert inside.is_symlink()
    assert outside.read_text() == NEW_CODE


def test_only_sources_are_looked_at(tree: Path) -> None:
    for name in (".git/x.py", "node_modules/x.py", ".venv/x.sh", "x.bin", "noext"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(CODE)
    (tree / "tool").write_text("#!/usr/bin/env python3\n" + CODE)
    (tree / "search").write_text("#!/bin/sh\n" + SCRIPT)
    _, out, _ = called(tree, "--dry-run")
    changed = [line.rpartition("/")[2] for line in out.splitlines() if line.startswith("+++ ")]
    assert sorted(changed) == ["find.sh", "loop.py", "search", "tool"]


def test_the_same_file_is_migrated_once(tree: Path) -> None:
    assert called(tree, tree / "app", tree / "app" / "loop.py", "--dry-run")[1].count("+++ b/") == 2


def test_doubtful_places_are_listed_with_file_and_line(tree: Path) -> None:
    (tree / "other.py").write_text("response.partial_data\n")
    (tree / "mine.py").write_text("import embferry\n\nrow['partial_data']\n")
    (tree / "notes.md").write_text("About embferry.\nIt needs continuation.\n")
    _, _, err = called(tree, "--dry-run")
    listed = [line.removeprefix(f"doubtful: {tree}/") for line in err.splitlines() if line.startswith("doubtful: ")]
    assert [line.partition(": ")[0] for line in listed] == ["mine.py:3", "notes.md:2", "other.py"]
    assert "+response.buffered_chunks" in called(tree, "--dry-run", "--assume")[1]


def test_a_file_that_changed_after_the_diff_is_not_overwritten(tree: Path) -> None:
    plan = run.plan([tree])
    (tree / "app" / "loop.py").write_text(CODE + "# edited\n")
    assert [left.partition(": ")[0] for left in run.apply(plan)] == [str(tree / "app" / "loop.py")]
    assert (tree / "app" / "loop.py").read_text() == CODE + "# edited\n"


def test_a_failed_write_leaves_the_file_and_no_temporary_file(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tree)
    plan = run.plan([tree])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert [left.partition(": ")[2] for left in run.apply(plan)] == ["No space left on device"] * 2
    assert contents(tree) == before


def test_without_libcst_the_error_names_the_package(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("libcst", "embferry.migrate"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("embferry.migrate.run")
    monkeypatch.setitem(sys.modules, "libcst", None)
    status, _, err = called(tree)
    assert (status, "pip install 'embferry[migrate]'" in err) == (2, True)
