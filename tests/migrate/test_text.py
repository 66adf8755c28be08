"""Log searches in scripts, configurations and documents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.migrate.text import rewrite
from embferry.migrate.words import replace_phrases


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('grep "continuation" logs/', 'grep "resume" logs/'),
        ('grep "continuation transfer" logs/', 'grep "resumed transfer" logs/'),
        ("grep -rn -A 3 continuation logs/ | grep 'partial_data'",
         "grep -rn -A 3 resume logs/ | grep 'buffered_chunks'"),
        ("kubectl logs x | grep -c needs_continuation", "kubectl logs x | grep -c needs_resume"),
        ('zgrep -E "Continuation|Sent" app.log.gz', 'zgrep -E "Resume|Sent" app.log.gz'),
        ('rg -e "Sent continuation request" -e continuation app.log',
         'rg -e "Sent resume transfer request" -e resume app.log'),
        ("awk '/continuation transfer/ {n++}' app.log", "awk '/resumed transfer/ {n++}' app.log"),
        ('journalctl -u x -g "continuation.*transfer"', 'journalctl -u x -g "resumed.*transfer"'),
        ("cat app.log \\\n  | grep -n \\\n continuation", "cat app.log \\\n  | grep -n \\\n resume"),
        ("Run `grep continuation logs/` to see a continuation.", "Run `grep resume logs/` to see a continuation."),
        ("""expr: '{app="x"} |= "continuation"'""", """expr: '{app="x"} |= "resume"'"""),
        ('{app="x"} |~ "(?i)needs continuation"', '{app="x"} |~ "(?i)needs resume for remaining data"'),
        (r'"expr": "{app=\"x\"} |= \"continuation\""', r'"expr": "{app=\"x\"} |= \"resume\""'),
        ("promtail:\n  - regex: needs continuation\r\n", "promtail:\n  - regex: needs resume for remaining data\r\n"),
        ("pattern: needs_continuation  # embferry", "pattern: needs_resume  # embferry"),
        ("grep 'rg continuation transfer' logs/ | rg continuation", "grep 'rg resumed transfer' logs/ | rg resume"),
    ],
)  # fmt: skip
def test_searches_are_rewritten(before: str, after: str) -> None:
    assert rewrite(before)[0] == after
    assert rewrite(after)[0] == after


@pytest.mark.parametrize(
    "text",
    [
        'grep "line continuation" logs/',
        'grep "HTTP continuation" logs/',
        "grep '100-continuation' logs/",
        "grep continuation src/parser.c",
        "git grep partial_data",
        "grep -v resume continuation.log",
        "grep resume logs/ | tee continuation.txt",
        "A continuation transfer is in the logs.",
        "echo continuation >> app.log",
        "pattern: continuation",
        "name: continuation of the logs",
        "ls logs/ # a line continuation \\\n",
    ],
)
def test_everything_else_is_left_alone(text: str) -> None:
    assert rewrite(text) == (text, [])


def test_assume_takes_any_search() -> None:
    new, _ = rewrite("grep partial_data x\npattern: continuation\n", assume=True)
    assert new == "grep buffered_chunks x\npattern: resume\n"


def test_old_names_outside_of_patterns_are_listed_where_the_file_names_the_system() -> None:
    text = "About embferry: a line continuation.\n    req.partial_data\nIt needs continuation.\n"
    new, doubtful = rewrite(text)
    assert (new, [line for line, _ in doubtful]) == (text, [2, 3])


WORDS = ["grep", "-e", "continuation", "needs", "'partial_data'", '"', "'", "|", "\\", "logs/", "|=", "pattern:", "x"]


@given(st.lists(st.sampled_from([*WORDS, "\n"]), max_size=25).map(" ".join) | st.text(max_size=60))
def test_rewriting_is_idempotent_and_keeps_lines(text: str) -> None:
    once, _ = rewrite(text)
    assert rewrite(once)[0] == once
    assert once.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Sent continuation request to room 3", "Sent resume transfer request to room 3"),
        ("NEEDS CONTINUATION", "NEEDS RESUME FOR REMAINING DATA"),
        ("needs continuation for the rest of it", "needs resume for remaining data of it"),
        ("needs continuation for remaining data", "needs resume for remaining data"),
        ("Continuation transfer", "Resumed transfer"),
        ("completed with continuation", "completed with resumed transfer"),
        ("continuation-transfer", "resumed-transfer"),
        ("start continuation transfer", "start resumed transfer"),
        ("continuation of the request", "continuation of the request"),
        ("a line continuation request", "a line continuation request"),
        ("mycontinuation transfer", "mycontinuation transfer"),
    ],
)
def test_phrases_keep_case_and_spacing(before: str, after: str) -> None:
    assert replace_phrases(before) == after
