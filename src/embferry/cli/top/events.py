"""Resumes, retries, failovers and errors, and workers that come and go, as they happen. Pure."""

from __future__ import annotations

from rich.text import Text

from embferry.cli.activity.words import sentence_of
from embferry.cli.top.board import Board
from embferry.cli.top.colours import FAINT, KINDS, SOFT
from embferry.cli.top.lines import clock, line

NONE = "Nothing yet: resumes, retries, failovers, errors, and workers that come and go."


def event_lines(board: Board, width: int) -> list[Text]:
    """Returns a line for each event, the latest first.

    Args:
        board: the routers.
        width: columns.
    """
    found = []
    for router in board.routers:
        if (activity := router.activity) is not None:
            found += [(router.epoch + event.at, router.label, event, activity) for event in activity.events()]
    found.sort(key=lambda one: -one[0])
    made = []
    for wall, label, event, activity in found:
        kind, title, text = sentence_of(event, activity)
        about = f" {label}#{event.request}" if event.request is not None else f" {label}" if label else ""
        parts = [
            (f"{clock(wall)} ", FAINT),
            (title, KINDS[kind]),
            (about, KINDS[""]),
            (f" – {text}" if text else "", SOFT),
        ]
        made.append(line(parts, width))
    return made or [line([(NONE, SOFT)], width)]
