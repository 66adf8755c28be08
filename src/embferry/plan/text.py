"""A plan as a table for people, and as an object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .advice import LONG_S, Advice, Row, seconds_text
from .model import Model
from .speeds import Speeds

HEAD = (
    "deployment", "carries /s", "used", "TTFT p50 ms", "p95 ms", "answer p95 ms", "answered /s", "encoders busy",
    "language busy",
)  # fmt: skip


class Report(NamedTuple):
    """Sentences, lines of a table, which may not be folded, and sentences again."""

    head: list[str]
    table: list[str]
    tail: list[str]


class Pictures(NamedTuple):
    """How many pictures a request has, and their sizes, which are taken in turn over all requests.

    A size is its width and height, or None where only its visual tokens are known.
    """

    images: int
    sizes: tuple[tuple[str | None, int], ...]

    @property
    def told(self) -> str:
        """The pictures in words."""
        each = [f"{f'{size} = ' if size else ''}{tokens:,} visual tokens" for size, tokens in self.sizes]
        turn = ", in turn" if len(each) > 1 else ""
        return f"{self.images} picture{'' if self.images == 1 else 's'} a request ({', '.join(each)}{turn})"


def report(model: Model, advice: Advice, speeds: Speeds, pictures: Pictures) -> Report:
    """Returns the report.

    Args:
        model: The model.
        advice: The plan.
        speeds: What it stands on.
        pictures: Of each request.
    """
    pool = advice.pool
    size = pool.tokens * model.token_bytes
    blocks = f"{pool.blocks:,} block{'' if pool.blocks == 1 else 's'}"
    token = f"{bytes_text(model.token_bytes)} a visual token"
    head = [
        f"{model.name}: {pictures.told}, {token}; {advice.split.rate:g} requests/s",
        f"speeds: {speeds.source}{_cores(speeds)}",
        *([noisy] if (noisy := speeds.noisy) else []),
        *([advice.played] if advice.played else []),
    ]
    tail = [
        f"take: {advice.best.deployment.name}{_meets(advice)}",
        f"pool of a language instance, if split: {pool.tokens:,} tokens = {blocks} of {pool.block_size} = "
        f"{bytes_text(size)}: {advice.pool_why}",
        advice.sentence,
    ]
    return Report(head, table([HEAD, *(_cells(row, row is advice.best) for row in advice.rows)]), tail)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_object(model: Model, advice: Advice, speeds: Speeds, pictures: Pictures) -> dict[str, Any]:
    """Returns the plan as JSON has it; times in seconds, and null where a deployment does not carry the rate."""
    pool = advice.pool
    return {
        "model": model.name,
        "token_bytes": model.token_bytes,
        "images": pictures.images,
        "sizes": [{"size": size, "tokens": tokens} for size, tokens in pictures.sizes],
        "rate": advice.split.rate,
        "speeds": speeds.source,
        "noise": speeds.noise,
        "played": advice.played,
        "rows": [_object(row) for row in advice.rows],
        "take": _object(advice.best),
        "ttft_goal": advice.goal,
        "worth_it": advice.is_worth,
        "why": advice.why,
        "pool": {
            "tokens": pool.tokens,
            "blocks": pool.blocks,
            "block_size": pool.block_size,
            "bytes": pool.tokens * model.token_bytes,
            "why": advice.pool_why,
        },
    }


def bytes_text(count: float) -> str:
    """Returns a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def time_text(seconds: float) -> str:
    """Returns a time for a column of milliseconds; a long one in seconds."""
    return seconds_text(seconds) if seconds >= LONG_S else f"{seconds * 1e3:,.0f}"


def _cells(row: Row, is_best: bool) -> tuple[str, ...]:
    outcome, deployment = row.outcome, row.deployment
    name, most, used = ("> " if is_best else "  ") + deployment.name, f"{row.capacity:.2f}", f"{row.used:.0%}"
    if outcome is None:
        return name, most, used, *["-"] * (len(HEAD) - 3)
    return (
        name,
        most,
        used,
        time_text(outcome.ttft(0.5)),
        time_text(outcome.ttft(0.95)),
        time_text(outcome.latency(0.95)),
        f"{outcome.throughput:.2f}",
        f"{outcome.encoder_busy:.0%}" if deployment.is_split else "-",
        f"{outcome.language_busy:.0%}",
    )


def _object(row: Row) -> dict[str, Any]:
    outcome, deployment = row.outcome, row.deployment
    return {
        "encoders": deployment.encoders,
        "languages": deployment.languages,
        "capacity": row.capacity,
        "used": row.used,
        "carries": row.carries,
        "ttft_p50": outcome and outcome.ttft(0.5),
        "ttft_p95": outcome and outcome.ttft(0.95),
        "answer_p95": outcome and outcome.latency(0.95),
        "throughput": outcome and outcome.throughput,
        "encoder_busy": outcome and outcome.encoder_busy,
        "language_busy": outcome and outcome.language_busy,
        "resumes": outcome and outcome.resumes,
    }


def _meets(advice: Advice) -> str:
    if advice.goal is None:
        return ""
    ttft = f"{advice.best.ttft * 1e3:,.0f} ms"
    return f", the fewest that meet --ttft-goal {advice.goal:g}: the time to first token is {ttft} in the median"


def _cores(speeds: Speeds) -> str:
    return f"; all instances share {speeds.cores:g} cores" if speeds.cores is not None else ""
