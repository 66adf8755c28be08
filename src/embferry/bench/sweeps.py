"""What changes how fast our own transports are: one thing at a time, on the transports that everybody has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from .contestants import Contestant
from .harness import Entry
from .payloads import IMAGE, SMALL, VIDEO, Payload

TRANSPORTS = ("shm", "tcp")
ROUNDS, FEW_ROUNDS = 5, 3
TRANSFERS = (1, 2, 5, 20, 100)
POOLS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
CROWDS = (1, 4, 16, 64, 256)
CROWD_PAYLOAD = Payload("8.4 MB", 256, "one of many at once")
CROWD_POOL = 4096
"""Tokens, 134 MB: none of the larger crowds fits."""


class Sweep(msgspec.Struct, frozen=True):
    name: str
    title: str
    axis: str
    what: str
    """``goodput``, or ``wait`` of small transfers behind large ones."""
    log: bool = False


SWEEPS = (
    Sweep("transfers", "One embedding in several transfers", "transfers", "goodput", log=True),
    Sweep("pool", "Size of the pool", "pool / embedding", "goodput", log=True),
    Sweep("crowd", "Transfers at once", "transfers at once", "goodput", log=True),
    Sweep("behind", "1 MiB behind 403 MB", "", "wait"),
    Sweep("verify", "Verification", "", "goodput"),
    Sweep("early", "Early announcement", "", "goodput"),
)
BY_NAME = {sweep.name: sweep for sweep in SWEEPS}


def entries(large: Payload = VIDEO, image: Payload = IMAGE) -> Iterator[list[Entry]]:
    """The points of each sweep: those of one list take turns. The rounds of each: :func:`rounds`."""
    for transport in TRANSPORTS:
        part = -(-large.tokens // max(TRANSFERS))
        yield [
            _point("transfers", transport, large, n, f"{n} transfer{'s' * (n > 1)}", _parts(n) | {"block_tokens": part})
            for n in TRANSFERS
        ]
        block = max(1, large.tokens // 400)
        yield [
            _point("pool", transport, large, share, f"pool {share:g}", _pool(large, share, block), copies=2 + share)
            for share in POOLS
        ]
        yield [_crowd(transport, count) for count in CROWDS]
        yield [_behind(transport, large)]
        yield [
            _point("verify", transport, image, index, mode, {"mode": mode, "in_place": True})
            for index, mode in enumerate(("verified", "ahead", "unverified"))
        ]
        for payload in (SMALL, image):
            yield [
                _point("early", transport, payload, index, word, {"early": early, "in_place": True})
                for index, (word, early) in enumerate((("announced early", True), ("announced when ready", False)))
            ]


def rounds(points: Sequence[Entry]) -> int:
    """Fewer where one round has many transfers."""
    return FEW_ROUNDS if points[0].sweep in ("crowd", "behind") else ROUNDS


def _point(
    sweep: str, transport: str, payload: Payload, x: float, word: str, options: dict[str, Any], copies: float = 3
) -> Entry:
    return Entry(
        _contestant(f"{sweep}/{transport}/{x:g}", f"{transport}, {word}", "ours:Ours", transport, options),
        payload,
        sweep,
        x,
        copies,
    )


def _contestant(key: str, label: str, factory: str, transport: str, options: dict[str, Any]) -> Contestant:
    full = {"transport": transport, "mode": "verified", "in_place": False} | options
    return Contestant(key, label, "ours", f"{__package__}.{factory}", full)


def _parts(count: int) -> dict[str, Any]:
    """One is what the pool grants by itself; several are granted by hand."""
    return {"transfers": count} if count > 1 else {}


def _pool(payload: Payload, share: float, block: int) -> dict[str, Any]:
    return {"pool_tokens": max(1, round(payload.tokens * share)), "block_tokens": block}


def _crowd(transport: str, count: int) -> Entry:
    options = {"count": count, "pool_tokens": CROWD_POOL, "block_tokens": 8}
    contestant = _contestant(
        f"crowd/{transport}/{count}", f"{transport}, {count} at once", "crowd:Crowd", transport, options
    )
    return Entry(contestant, CROWD_PAYLOAD, "crowd", count, copies=2 + count + CROWD_POOL / CROWD_PAYLOAD.tokens)


def _behind(transport: str, large: Payload) -> Entry:
    options = {"pool_tokens": large.tokens // 3, "block_tokens": 16}
    contestant = _contestant(
        f"behind/{transport}", f"{transport}, small behind large", "crowd:Behind", transport, options
    )
    return Entry(contestant, large, "behind", 0, copies=3)
