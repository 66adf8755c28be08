"""Times to the first token and of transfers over the last minutes. Pure."""

from __future__ import annotations

from rich.text import Text

from embferry.cli.activity.state import mean_of
from embferry.cli.activity.told import Sample
from embferry.cli.activity.words import spent
from embferry.cli.top.bars import columns, nice_ceiling
from embferry.cli.top.board import Board
from embferry.cli.top.colours import FAINT, PHASES, SOFT, STRONG
from embferry.cli.top.lines import line

SERIES = {"ttft": ("first token", "decode", "#1d5c46"), "transfer": ("transfer", "transfer", "#1f5277")}
"""A series → its words, the phase whose colour its means have, and the colour of its highest values."""


def times_lines(board: Board, at: float, seconds: float, width: int, height: int) -> list[Text]:
    """Returns the lines of both series.

    Args:
        board: the routers; the times of all are taken together.
        at: seconds of the reader's clock.
        seconds: the time that is shown.
        width: columns.
        height: lines of a series, beside the one in words.
    """
    made = []
    if width < 1:  # not seen
        return []
    # The router before vLLM does not see transfers.
    shown = [series for series in SERIES if series != "transfer" or any(_is_ours(board))]
    for series in shown:
        words, phase, faint = SERIES[series]
        samples = [sample for _, sample in _aged(board, series, at, seconds)]
        mean, highest = mean_of(samples), max((sample.highest for sample in samples), default=0.0)
        about = "none yet" if mean is None else f"mean {spent(mean)}, most {spent(highest)}"
        made.append(line([(words, STRONG), (f"  {about}", SOFT)], width))
        buckets = _buckets(board, series, at, seconds, width)
        top = nice_ceiling(highest) if highest > 0 else 1.0
        made += columns(buckets, top, height, PHASES[phase], faint)
    if made:
        ago = f"{seconds / 60:g} min ago"
        made.append(line([(ago + "now".rjust(max(1, width - len(ago))), FAINT)], width))
    return made


def _is_ours(board: Board) -> list[bool]:
    told = [router.activity.told for router in board.routers if router.activity is not None]
    return [one.engine != "vllm" for one in told] or [True]


def _aged(board: Board, series: str, at: float, seconds: float) -> list[tuple[float, Sample]]:
    """Returns the samples of all routers with their ages."""
    found = []
    for router in board.routers:
        if (activity := router.activity) is not None:
            now = activity.now(at)
            found += [(now - sample.second, sample) for sample in activity.samples(series, now - seconds)]
    return found


def _buckets(board: Board, series: str, at: float, seconds: float, width: int) -> list[tuple[float, float] | None]:
    """Returns (mean, highest) of the times in each column, the oldest first; None where there is none."""
    held: list[list[Sample]] = [[] for _ in range(width)]
    for age, sample in _aged(board, series, at, seconds):
        held[min(width - 1, max(0, int((seconds - age) / seconds * width)))].append(sample)
    return [
        None if (mean := mean_of(samples)) is None else (mean, max(sample.highest for sample in samples))
        for samples in held
    ]
