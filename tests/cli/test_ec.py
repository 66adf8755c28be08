"""``embferry ec``: shows and prunes a folder of embeddings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from embferry.cache.entry import Entry
from tests.cache.samples import LAYOUT, file_bytes, keep, key_of, opened, path_of, sample
from tests.serve.test_cli import called


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder with the embeddings a, b and c, used three, two and one hours ago. The last one is damaged."""
    store = opened(tmp_path)
    for hours, name in ((3, "a"), (2, "b"), (1, "c")):
        keep(store, name)
        if name == "c":
            path = path_of(tmp_path / "cache", name)
            raw = path.read_bytes()
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        at = time.time() - 3600 * hours - 60
        os.utime(path_of(tmp_path / "cache", name), (at, at))
    return str(tmp_path / "cache")


def read(*words: str) -> Any:
    status, out, err = called("ec", *words, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def left(folder: str) -> str:
    names = {path.stem for path in Path(folder).iterdir()}
    return "".join(name for name in "abc" if key_of(name) in names)


def test_ls_lists_the_latest_used_first(folder: str) -> None:
    status, out, err = called("ec", "ls", folder)
    assert (status, err) == (0, "")
    found = [line.split()[1] for line in out.splitlines() if "ago" in line]
    assert found == [key_of(name)[:16] for name in "cba"]
    assert "a model" in out
    assert "input_embeddings float32[8], fill_ids int32[1]" in out
    assert "3 h ago" in out
    rows = read("ls", folder)
    assert [row["key"] for row in rows] == [key_of(name) for name in "cba"]
    assert (rows[0]["tokens"], rows[0]["bytes"], rows[0]["model"]) == (16, file_bytes("a"), "a model")


def test_ls_says_that_there_are_more(folder: str) -> None:
    status, out, err = called("ec", "ls", folder, "--limit", "1")
    assert (status, out.count("ago")) == (0, 1)
    assert "2 more" in err
    assert called("ec", "ls", folder, "--limit", "0")[1].count("ago") == 3


def test_ls_shows_a_file_that_cannot_be_read(folder: str) -> None:
    path_of(Path(folder), "b").write_bytes(b"x")
    assert "it has only 1 bytes" in called("ec", "ls", folder)[1]
    assert [row.get("problem", "") for row in read("ls", folder)].count("it has only 1 bytes") == 1


def test_stats_counts_by_model(folder: str) -> None:
    path_of(Path(folder), "b").write_bytes(b"x")
    status, out, _ = called("ec", "stats", folder)
    assert status == 0
    assert "3 embeddings" in out
    assert "(not readable)" in out
    found = read("stats", folder, "--verify")
    assert (found["files"], found["damaged"]) == (3, 2)
    assert {row["model"]: row["files"] for row in found["models"]} == {"a model": 2, "(not readable)": 1}


def test_stats_of_an_empty_folder(tmp_path: Path) -> None:
    opened(tmp_path)
    assert read("stats", str(tmp_path / "cache")) == {"files": 0, "bytes": 0, "damaged": None, "models": []}


@pytest.mark.parametrize(
    ("words", "remaining"),
    [
        ([key_of("a")], "bc"),
        ([key_of("a")[:16], key_of("c")], "b"),
        (["--unused-for", "90m"], "c"),
        (["--unused-for", "30d"], "abc"),
        (["--to-bytes", str(2 * file_bytes("a"))], "bc"),
        (["--to-bytes", "0"], ""),
        (["--model", "a model"], ""),
        (["--model", "another"], "abc"),
        (["--damaged"], "ab"),
        (["--all"], ""),
    ],
)
def test_rm_removes_what_it_is_told(folder: str, words: list[str], remaining: str) -> None:
    removed = read("rm", folder, *words)
    assert left(folder) == remaining
    assert len(removed["removed"]) == 3 - len(remaining)
    assert removed["bytes"] == file_bytes("a") * len(removed["removed"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name keys"),
        (["--all", "--damaged"], "name keys"),
        ([key_of("a"), "--all"], "name keys"),
        (["abc"], "a key has"),
        (["../../etc/passwd"], "a key has"),
        (["--unused-for", "soon"], "a time is like"),
    ],
)
def test_rm_does_not_guess(folder: str, words: list[str], why: str) -> None:
    status, _, err = called("ec", "rm", folder, *words)
    assert (status, why in err) == (2, True)
    assert left(folder) == "abc"


@pytest.mark.parametrize("verb", [["ls"], ["stats"], ["rm", "--all"]])
def test_a_folder_that_cannot_be_used_is_said(folder: str, verb: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    status, _, err = called("ec", verb[0], str(missing), *verb[1:])
    assert (status, "there is no such folder" in err, missing.exists()) == (2, True, False)
    Path(folder).chmod(0o755)
    status, _, err = called("ec", verb[0], folder, *verb[1:])
    assert (status, "must be 700" in err) == (1, True)


def test_a_name_in_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    """Neither the model's, which may be ASCII alone, nor a field's."""
    store = opened(tmp_path)
    entry, data = sample("a")
    layout = type(LAYOUT)((type(LAYOUT.fields[0])("\x1b[2J\u202e", "uint8", len(data)),))
    odd = Entry(entry.key, layout, 1, entry.digest, "[red]model")
    path_of(tmp_path / "cache", "a").write_bytes(odd.head() + bytes(data))
    out = called("ec", "ls", str(tmp_path / "cache"))[1]
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]model" in out
    assert store.describe(entry.key) == odd
