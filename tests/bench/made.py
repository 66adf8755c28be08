"""Results that nobody measured, for tests of what is made from results."""

from __future__ import annotations

from typing import Any

from embferry.bench.contestants import BY_KEY
from embferry.bench.payloads import IMAGE, SMALL, Payload
from embferry.bench.results import SCHEMA, Machine, Measurement, Results, Sample

MACHINE = Machine("A CPU", 2, 8 << 30, "Linux 6", "never", {"python": "3.11", "nixl": ""})


def sample(seconds: float, **details: Any) -> Sample:
    return Sample(seconds, 0.25 * seconds, 0.5 * seconds, None, 5_000_000, details)


def measured(key: str, *seconds: float, payload: Payload = IMAGE, wire: float | None = 1.0) -> Measurement:
    """A contestant of the comparison with these times."""
    c = BY_KEY[key]
    samples = [
        Sample(s, 0.01, 0.02, None if wire is None else round(payload.size * wire), 5_000_000, {}) for s in seconds
    ]
    made = Measurement(c.key, c.label, c.kind, payload, samples=samples, verified_rounds=2, options=dict(c.options))
    if c.kind == "ours" and not c.options["in_place"]:
        made.pool_bytes = 4_000_000
    return made


def point(
    sweep: str, transport: str, x: float, *samples: Sample, payload: Payload = IMAGE, **options: Any
) -> Measurement:
    """A point of a sweep."""
    label = f"{transport}, {x:g}"
    options |= {"transport": transport}
    return Measurement(
        f"{sweep}/{transport}/{x:g}", label, "ours", payload, samples=list(samples), sweep=sweep, x=x, options=options
    )


def left_out(key: str, status: Any, reason: str, payload: Payload = IMAGE) -> Measurement:
    c = BY_KEY[key]
    return Measurement(c.key, c.label, c.kind, payload, status=status, reason=reason, options=dict(c.options))


def results(*measurements: Measurement) -> Results:
    return Results(
        SCHEMA, "embferry bench transfer", "2026-11-24T10:00:00+00:00", 61.0, False, MACHINE, [*measurements]
    )


def everything() -> Results:
    """One of each kind of line."""
    ready = [2_000_000_000, 2_000_000_000, 2_100_000_000]
    small = {
        "small_began": [0, 10, 100],
        "small_ready": [5, 16, 160],
        "unloaded": 2,
        "large_began": 90,
        "large_ready": 200,
    }
    return results(
        measured("copy/private", 0.005, 0.006, 0.007),
        measured("shm/verified/in-place", 0.010, 0.011, 0.012),
        measured("shm/verified/gathered", 0.020, 0.021, 0.022),
        measured("zeromq/copied", 0.05, wire=None),
        left_out("files", "missing", "safetensors is not installed: pip install <it>"),
        left_out("direct/nixl", "error", "receiver: killed by SIGSEGV | in 'make'"),
        measured("shm/verified/in-place", 0.0008, 0.0009, payload=SMALL),
        measured("zeromq/copied", 0.002, payload=SMALL),
        *(point("transfers", "shm", n, sample(1.0 + n / 1000, transfers=n)) for n in (1, 20, 100)),
        *(point("pool", "shm", share, sample(2.0 - share)) for share in (0.02, 1.0)),
        point("crowd", "shm", 1, sample(1.0, began=10**9, ready=[2 * 10**9]), count=1),
        point("crowd", "shm", 256, sample(1.1, began=10**9, ready=ready), count=256),
        point("behind", "shm", 0, sample(3.0, **small)),
        point("verify", "shm", 0, sample(1.0)),
        point("early", "tcp", 1, sample(1.0)),
    )
