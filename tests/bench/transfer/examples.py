"""Results made by hand, for tests of reports."""

from __future__ import annotations

from typing import Any

from embferry.bench.machine import Machine
from embferry.bench.transfer.candidates import ALL
from embferry.bench.transfer.payloads import IMAGE, SMALL, Payload
from embferry.bench.transfer.results import Measurement, Sample, TransferResults

MACHINE = Machine("A CPU", 2, 8 << 30, "Linux 6", "never", {"python": "3.11", "nixl": ""})
BY_KEY = {candidate.key: candidate for candidate in ALL}


def sample(seconds: float, **more: Any) -> Sample:
    return Sample(seconds, 0.01, 0.02, 5_000_000, **more)


def measured(key: str, *seconds: float, payload: Payload = IMAGE) -> Measurement:
    """Returns a candidate of the comparison with these times."""
    c = BY_KEY[key]
    return Measurement(c.key, c.label, c.kind, payload, samples=[*map(sample, seconds)], options=dict(c.options))


def point(sweep: str, transport: str, x: float, *samples: Sample, **options: Any) -> Measurement:
    """Returns a point of a sweep."""
    key, label = f"{sweep}/{transport}/{x:g}", f"{transport}, {x:g}"
    options |= {"transport": transport}
    return Measurement(key, label, "ours", IMAGE, samples=list(samples), sweep=sweep, options=options)


def left_out(key: str, status: Any, reason: str) -> Measurement:
    c = BY_KEY[key]
    return Measurement(c.key, c.label, c.kind, IMAGE, status=status, reason=reason, options=dict(c.options))


def results(*measurements: Measurement) -> TransferResults:
    return TransferResults(
        command="embferry bench transfer",
        started="2026-11-24T10:00:00+00:00",
        took_s=61.0,
        complete=True,
        machine=MACHINE,
        load_before=(0.5, 0.5, 0.5),
        load_after=(1.5, 0.5, 0.5),
        measurements=[*measurements],
    )


def everything() -> TransferResults:
    """Returns results with every kind of row."""
    return results(
        measured("copy/private", 0.005, 0.006, 0.007),
        measured("shm/verified/in-place", 0.010, 0.011, 0.012),
        measured("shm/verified/gathered", 0.020, 0.021, 0.022),
        measured("tcp/verified/in-place", 0.030, 0.031, 0.032),
        measured("zeromq/copied", 0.05),
        left_out("files", "missing", "safetensors is not installed: pip install <it>"),
        left_out("direct/nixl", "error", "receiver: killed by SIGSEGV | in 'make'"),
        measured("shm/verified/in-place", 0.0008, 0.0009, payload=SMALL),
        measured("zeromq/copied", 0.002, payload=SMALL),
        *(point("pool", "shm", share, sample(2.0 - share, transfers=round(2 / share))) for share in (0.02, 1.0)),
        point("concurrency", "shm", 1, sample(1.0, waits=[1.0]), rooms=[256]),
        point("concurrency", "shm", 4, sample(1.1, waits=[1.0, 1.0, 1.1, 1.1]), rooms=[256] * 4),
        point("behind", "shm", 0, sample(3.0, waits=[0.1, 0.2, 0.3]), tokens=32, count=3),
        point("behind", "shm", 1, sample(3.0, waits=[2.0, 0.5, 1.0]), tokens=32, count=3, large=True),
        point("small", "shm", 1, sample(0.1, waits=[0.001] * 10), tokens=1, count=10),
        point("small", "tcp", 64, sample(0.1), tokens=2, count=100),
        *(point("rooms", "shm", n, sample(0.1, waits=[0.002]), tokens=1, count=10, open=n) for n in (10, 10_000)),
        point("early", "tcp", 1, sample(1.0)),
    )
