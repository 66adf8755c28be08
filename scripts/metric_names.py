"""The rules for names of metrics, which docs/metrics.md states and ``tests/tooling/test_metric_names.py`` checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

PREFIX = "embferry"
PARTS = {
    "router": "both routers",
    "worker": "encode and language workers",
    "encode": "encode workers",
    "language": "language workers",
    "bootstrap": "the bootstrap server",
    "connector": "the connectors under vLLM and SGLang",
    "process": "every process that has the metric, with the same meaning in each",
}
"""The second word of a name, and what serves it."""
LABELS = {
    "code": "code of an error, as in [errors](errors.md)",
    "finish_reason": "why an answer ended, as in OpenAI's API",
    "key": "name of an API key",
    "kind": "`image`, `video` or another kind of media",
    "outcome": "how it ended",
    "path": "path of an HTTP request; unknown ones have one value together",
    "phase": "`initial` or `resumed` transfer",
    "reason": "why it was refused, not found or dropped",
    "role": "of the other end: `encode`, `language`, `prefill` or `decode`",
    "state": "of the things that are counted",
    "status": "HTTP status",
    "transport": "`shm`, `tcp`, …",
}
"""Every label, and what its values are."""
TARGET_LABELS = ("job", "instance", "part", "worker")
"""Labels that Prometheus gives to a target: its own, and those of the router's ``/sd``."""
UNITS = ("seconds", "bytes")
FOREIGN_UNITS = re.compile(r"(milli|micro|nano)seconds|ms|us|minutes|hours|days|[kmg]i?b|(kilo|mega|giga)bytes|percent")
EVENTS = frozenset({"aborted", "closed", "dropped", "ended", "evicted", "failed", "refused", "rejected", "skipped"})
"""Words of what has happened, which only counters count."""
SHORT = frozenset({"in", "to", "http"})
"""Words that are short or have no vowel, and are no abbreviations."""


class Row(NamedTuple):
    """One metric as it is served."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


def faults(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """Returns what breaks the rules, a sentence each.

    Args:
        parts: The metrics of each process, under the process's title.
    """
    found: list[str] = []
    seen: dict[str, Row] = {}
    for title, rows in parts.items():
        for row in rows:
            found += [f"{row.name} ({title}): {fault}" for fault in _faults_of(row)]
            if seen.setdefault(row.name, row) != row:
                found.append(f"{row.name} ({title}): another process serves it with another type, help text or labels")
    return found


def _faults_of(row: Row) -> Iterator[str]:
    match = re.fullmatch(rf"{PREFIX}_({'|'.join(PARTS)})_([a-z]+(?:_[a-z]+)*)", row.name)
    if match is None:
        yield f"is not {PREFIX}_PART_WORDS in lower case, with one of {', '.join(PARTS)}"
        return
    plain = match[2].removesuffix("_total")
    words = plain.split("_")
    if (row.type == "counter") != row.name.endswith("_total"):
        yield "counters end with _total, and nothing else does"
    if row.type == "histogram" and words[-1] not in UNITS:
        yield "a histogram ends with its unit"
    if any(unit in words[:-1] for unit in UNITS):
        yield "the unit stands at the end"
    yield from (f"{word} is no base unit" for word in words if FOREIGN_UNITS.fullmatch(word))
    yield from (f"{word} is an abbreviation" for word in words if _is_abbreviation(word))
    for start, unit in (("Bytes", "bytes"), ("Seconds", "seconds"), ("Time", "seconds")):
        if row.help.split()[0] == start and words[-1] != unit:
            yield f"its help text begins with {start}, so it ends with _{unit}"
    if words[-1] in ("count", "sum", "bucket", "created", "info"):
        yield f"_{words[-1]} is a suffix that Prometheus gives"
    if "by" in words:
        yield "a label's name is no part of a name"
    if row.type == "gauge" and not EVENTS.isdisjoint(words):
        yield "what has happened is counted by a counter"
    yield from (f"the label {label} is not in LABELS" for label in row.labels if label not in LABELS)
    yield from (f"the label {label} is the target's" for label in row.labels if label in TARGET_LABELS)


def _is_abbreviation(word: str) -> bool:
    return word not in SHORT and (len(word) < 3 or not re.search("[aeiouy]", word))
