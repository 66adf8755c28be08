"""The first lines of the screen: each router with its state, and its reasons. Pure."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from embferry.cli.activity.report import WORDS
from embferry.cli.activity.state import Activity
from embferry.cli.activity.summary import Health, Summary, no_answer, recent, summary_of
from embferry.cli.activity.words import BAD, GOOD, PLAIN, WARN
from embferry.cli.ask import counted
from embferry.cli.top.board import Watched
from embferry.cli.top.colours import KINDS, SOFT, STRONG
from embferry.cli.top.lines import line, sentence

_COLOURS: dict[Health, Style] = {
    "ready": KINDS[GOOD],
    "degraded": KINDS[WARN],
    "not_ready": KINDS[BAD],
    "no_answer": KINDS[BAD],
}


def router_lines(router: Watched, at: float, seconds: float, width: int) -> list[Text]:
    """Returns the lines of a router.

    Args:
        router: the router.
        at: seconds of the reader's clock.
        seconds: the time that counts as recent.
        width: columns.
    """
    label = [(f"{router.label} ", STRONG)] if router.label else []
    if router.activity is None and not router.trouble:
        return [line([*label, ("○ ", SOFT), (router.url, STRONG), ("  connecting", SOFT)], width)]
    summary = summary_in_time(router, at, seconds)
    words, style = WORDS[summary.health], _COLOURS[summary.health]
    dot = "○" if router.trouble else "●"
    first = line(
        [*label, (f"{dot} {words}", style), (f"  {router.url}", STRONG), (f"  {_about(router, at, seconds)}", SOFT)],
        width,
    )
    indent = " " * (2 + 2 * bool(router.label))
    reasons = [
        Text(indent, no_wrap=True, end="").append(part)
        for reason in summary.reasons
        for part in sentence(reason, max(1, width - len(indent)), KINDS[PLAIN] if not router.trouble else SOFT)
    ]
    return [first, *reasons]


def summary_in_time(router: Watched, at: float, seconds: float) -> Summary:
    """Returns the summary of a router, which has not answered if it is not heard now."""
    if router.trouble or router.activity is None:
        return no_answer(f"{router.trouble}; trying again {_in(router.retry_at - at)}")
    return summary_of(router.activity, router.activity.now(at), seconds)


def _about(router: Watched, at: float, seconds: float) -> str:
    activity = router.activity
    if activity is None:
        return ""
    if router.trouble:
        return f"as it was {router.unheard(at):.0f} s ago"
    told = activity.told
    parts = [", ".join(told.models) or "no model", f"{told.under_way:,} under way", *_counts(activity, at, seconds)]
    return " · ".join([*parts, told.router])


def _counts(activity: Activity, at: float, seconds: float) -> list[str]:
    """Returns what has gone on lately, without the numbers that are 0."""
    counts = recent(activity, activity.now(at) - seconds)
    words = [
        counted(counts["resumes"], "resume"),
        counted(counts["retries"], "retry"),
        counted(counts["failovers"], "failover"),
        counted(counts["errors"], "error"),
    ]
    shown = [word for word in words if not word.startswith("0 ")]
    return [f"{', '.join(shown)} in {seconds / 60:g} min"] if shown else []


def _in(seconds: float) -> str:
    return f"in {seconds:.0f} s" if seconds >= 0.5 else "now"
