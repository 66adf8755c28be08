"""Numbers, requests and events in words, as the live page has them."""

from __future__ import annotations

from embferry.cli.activity.state import Activity
from embferry.cli.activity.told import Event, Request, Transfer
from embferry.cli.ask import counted

_UNITS = ("B", "kB", "MB", "GB", "TB")
GOOD, MOVED, WARN, BAD, PLAIN = "good", "moved", "warn", "bad", ""
"""Kinds of events."""


def spent(seconds: float) -> str:
    """Returns a time: "0 ms", "3.4 ms", "120 ms", "1.24 s", "75.0 s"."""
    if seconds < 1:
        value = seconds * 1000
        digits = 0 if value <= 0 or value >= 10 else 2 if value < 1 else 1
        return f"{max(0.0, value):.{digits}f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 1000 else f"{seconds:,.0f} s"


def size(number: float) -> str:
    """Returns a number of bytes: "512 B", "1.5 MB"."""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.{1 if unit and number < 100 else 0}f} {_UNITS[unit]}"


def media_of(request: Request) -> str:
    """Returns what was asked about: "2 pictures, 1 video", or "text"."""
    parts = [(request.images, "picture"), (request.videos, "video")]
    return ", ".join(counted(count, thing) for count, thing in parts if count) or "text"


def transferred(transfer: Transfer) -> str:
    """Returns a sentence about a transfer."""
    times = f"1 initial and {counted(transfer.resumes, 'resumed transfer')}" if transfer.resumes else "1 transfer"
    tokens = f"{transfer.tokens:,} of {counted(transfer.total_tokens, 'token')}"
    over = f" over {transfer.transport}," if transfer.transport else ""
    return f"{tokens}, {size(transfer.bytes)} in all,{over} in {times}"


def state_of(request: Request, *, short: bool = False) -> str:
    """Returns the phase or the outcome of a request, with its resumes and attempts, in words or in signs."""
    told = request.phase or request.outcome
    transfer = request.transfer
    if told == "transfer" and transfer is not None and transfer.total_tokens:
        told += f" {min(100, 100 * transfer.tokens // transfer.total_tokens)} %"
    if short:
        signs = [
            f"↻{request.resumes}" if request.resumes else "",
            f"×{request.attempts}" if request.attempts > 1 else "",
        ]
        return " ".join(filter(None, (told, *signs)))
    notes = [
        counted(request.resumes, "resume") if request.resumes else "",
        counted(request.attempts, "attempt") if request.attempts > 1 else "",
    ]
    return " · ".join(filter(None, (told, *notes)))


def described(activity: Activity, id: str) -> str:
    """Returns the name of a worker with its id, where it has both."""
    name = activity.name(id)
    return id if name == id else f"{name} ({id})"


def sentence_of(event: Event, activity: Activity) -> tuple[str, str, str]:
    """Returns the kind of an event, its title, and what there is to say about it."""
    at = activity.name(event.worker) if event.worker else ""
    reason = f": {event.reason}" if event.reason else ""
    known: dict[str, tuple[str, str, str]] = {
        "resumed": (MOVED, counted(event.count, "resume"), f"the pool of {at} holds a part at a time"),
        "second_attempt": (WARN, "second attempt", f"after {event.code}{f' at {at}' if at else ''}"),
        "encode_retry": (WARN, "encode tried again", f"at {at}"),
        "failover": (WARN, "failover", f"the transfer goes on from {at}"),
        "fallback": (WARN, "sent undivided", "the language instance encodes this one itself"),
        "error": (BAD, event.code, "the client was told"),
        "client_left": (PLAIN, "client left", "its work was ended"),
        "worker_failed": (BAD, "a call failed", f"to {at}{reason}"),
        "damaged": (WARN, "damaged message", f"between the router and {at}; it does not count"),
        "worker_found": (GOOD, "worker found", described(activity, event.worker)),
        "worker_lost": (BAD, "worker lost", f"{event.role} {event.worker}{reason}"),
    }
    kind, title, text = known.get(event.kind, (PLAIN, event.kind, ""))
    times = f" ×{event.count:,}" if event.count > 1 and event.kind != "resumed" else ""
    return kind, f"{title}{times}", text
