"""Log searches in scripts, configurations and documents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.migrate.text import rewrite
from embferry.migrate.words import compound, names, phrases


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
        ('{app="x"} |~ "(?i)needs continuation"', '{app="x"} |~ "(?i)needs resume"'),
        (r'"expr": "{app=\"x\"} |= \"continuation\""', r'"expr": "{app=\"x\"} |= \"resume\""'),
        ("promtail:\n  - regex: needs continuation\r\n", "promtail:\n  - regex: needs resume\r\n"),
        ("pattern: needs_continuation  # embferry", "pattern: needs_resume  # embferry"),
    ],
)  # fmt: skip
def test_searches_are_rewritten(before: str, after: str) -> None:
    assert rewrite(before) == after
    assert rewrite(after) == after


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
    assert rewrite(text) == text


def test_assume_takes_any_search() -> None:
    assert rewrite("grep partial_data x\npattern: continuation\n", assume=True) == (
        "grep buffered_chunks x\npattern: resume\n"
    )


WORDS = [
    "grep",
    "-e",
    "continuation",
    "needs",
    "'partial_data'",
    '"',
    "'",
    "|",
    "\\",
    "\n",
    "logs/",
    "|=",
    "pattern:",
    "x",
]


@given(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join) | st.text(max_size=60))
def test_rewriting_is_idempotent_and_keeps_lines(text: str) -> None:
    once = rewrite(text)
    assert rewrite(once) == once
    assert once.count("\n") == text.count("\n")


# Words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Sent continuation request to room 3", "Sent resume transfer request to room 3"),
        ("NEEDS CONTINUATION", "NEEDS RESUME"),
        ("Continuation transfer", "Resumed transfer"),
        ("completed with continuation", "completed with resumed transfer"),
        ("continuation-transfer", "resumed-transfer"),
        ("continuation of the request", "continuation of the request"),
        ("a line continuation request", "a line continuation request"),
        ("mycontinuation transfer", "mycontinuation transfer"),
    ],
)
def test_phrases_keep_case_and_spacing(before: str, after: str) -> None:
    assert phrases(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("_pending_continuation_requests", "_pending_resume_requests"),
        ("ContinuationState", "ResumeState"),
        ("MAX_CONTINUATIONS", "MAX_RESUMES"),
        ("line_continuation", None),
        ("http_continuation_request", None),
        ("continuation", None),
        ("partial_data", None),
    ],
)
def test_compound_names_are_of_the_familys_words(before: str, after: str | None) -> None:
    assert compound(before) == after


def test_placeholders_are_no_names() -> None:
    text = "{partial_data} %(partial_data)s $partial_data my_partial_data"
    assert names(text) == text
    assert names("x.partial_data=3, partial_data") == "x.buffered_chunks=3, buffered_chunks"
