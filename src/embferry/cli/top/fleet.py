"""The workers of the routers, with what they do and how full their pools are. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

from rich.text import Text

from embferry.cli.activity.state import Activity
from embferry.cli.activity.told import Pool, Worker
from embferry.cli.activity.words import BAD, GOOD, WARN
from embferry.cli.ask import counted
from embferry.cli.top.bars import gauge
from embferry.cli.top.board import Board
from embferry.cli.top.colours import KINDS, PHASES, SOFT, STRONG
from embferry.cli.top.lines import cell, line

NAME, GAUGE, PLACE = 12, 16, 22
"""Columns."""
_WIDE, _ROOMY = 76, 104
"""Columns of a line that also has a gauge; that also has the place of its worker."""


def fleet_lines(board: Board, width: int) -> list[Text]:
    """Returns a line for each worker, under a line for its router if there are several."""
    made: list[Text] = []
    for router in board.routers:
        activity = router.activity
        if router.label and (activity is not None or router.trouble):
            made.append(line([(f"{router.label} ", STRONG), (router.url, SOFT)], width))
        if activity is not None:
            made += [_worker_line(worker, activity, width) for worker in activity.told.workers]
            if not activity.told.workers:
                made.append(line([("no worker", SOFT)], width))
    return made


def _worker_line(worker: Worker, activity: Activity, width: int) -> Text:
    dot = ("● ", KINDS[GOOD]) if worker.up else ("○ ", KINDS[WARN if worker.trouble.startswith("it has") else BAD])
    parts = [line([dot], 2), cell(activity.name(worker.id), NAME, STRONG), Text(" ")]
    if width >= _ROOMY:
        parts += [cell(_place(worker), PLACE, SOFT), Text(" ")]
    if not worker.up:
        return line([*parts, (worker.trouble or "not up", KINDS[WARN])], width)
    doing = f"{counted(worker.in_flight, 'request')}{_phases(worker, activity)}"
    pool = activity.pool(worker.id)
    if pool is None:
        return line([*parts, (doing, SOFT)], width)
    about = _pool_in_words(pool)
    taken = 2 + NAME + 1 + (PLACE + 1 if width >= _ROOMY else 0)
    if width >= _WIDE and not pool.error:
        column = max(8, width - taken - GAUGE - len(about) - 3)
        return line([*parts, cell(doing, column, SOFT), Text(" "), _gauge(pool), (f" {about}", SOFT)], width)
    return line([*parts, (f"{doing} · {about}", SOFT)], width)


def _phases(worker: Worker, activity: Activity) -> str:
    """Returns the phases of the requests that a worker works on: ": 2 prefill, 1 decode"."""
    counts: dict[str, int] = {}
    for request in activity.running():
        encodes = request.phase == "encode" and worker.id in request.encoders[-1:]
        answers = request.phase not in ("fetch", "encode") and request.language == worker.id
        if encodes or answers:
            counts[request.phase] = counts.get(request.phase, 0) + 1
    order = list(PHASES)
    named = sorted(counts, key=lambda name: order.index(name) if name in PHASES else len(order))
    return f": {', '.join(f'{counts[name]} {name}' for name in named)}" if counts else ""


def _place(worker: Worker) -> str:
    """Returns host and port of a worker's URL."""
    try:
        return urlsplit(worker.url).netloc.rpartition("@")[2] or worker.url
    except ValueError:  # of brackets
        return worker.url


def _pool_in_words(pool: Pool) -> str:
    if pool.error:
        return f"pool: {pool.error}"
    held = f", {pool.quarantined:,} quarantined" if pool.quarantined else ""
    return f"{pool.used:,} of {counted(pool.num_blocks, 'block')}{held}"


def _gauge(pool: Pool) -> Text:
    blocks = max(1, pool.num_blocks)
    return gauge([(pool.used / blocks, PHASES["transfer"]), (pool.quarantined / blocks, PHASES["encode"])], GAUGE)
