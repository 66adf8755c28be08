"""Sweeps: each varies one thing about embferry, over the transports that need no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .candidates import OURS, TRUST_NEEDS, Candidate
from .payloads import IMAGE, SMALL, VIDEO, Payload
from .rounds import Entry
from .trust import TRUSTS

TRANSPORTS = ("shm", "tcp")
POOLS = (0.02, 0.04, 0.1, 0.2, 0.5, 1.0, 2.0)
COUNTS = (1, 4, 16, 64, 256)
EQUAL = Payload("8.4 MB", 256, "one of many at once")
EQUAL_POOL = 4096
"""Tokens, 134 MB: 64 and 256 such embeddings do not fit."""
ONE, TWO = Payload("32 KiB", 1, "one token"), Payload("64 KiB", 2, "two tokens")
BEHIND = 45
"""Small embeddings behind a large one."""
ROOMS = (10, 10_000)
"""How many other rooms are open."""
QUIET = {
    "retry_interval": 3600.0,
    "retry_limit": 3600.0,
    "answer_timeout": 3600.0,
    "peer_timeout": 3600.0,
    "bootstrap_timeout": 3600.0,
    "waiting_timeout": 3600.0,
    "lease_timeout": 3600.0,
}
"""Settings with which an idle room sends nothing: its signs of life are not part of the cost of another transfer."""
MANY = f"{__package__}.small"


def sweeps(quick: bool = False, large: Payload = VIDEO) -> Iterator[list[Entry]]:
    """Yields the points of each sweep; those of one list take turns. ``quick``: small transfers alone."""
    yield [*_small(), *([] if quick else _rooms())]
    if quick:
        return
    yield list(_trust())
    for transport in TRANSPORTS:
        yield list(_pools(transport, large))
        yield list(_concurrency(transport))
        yield list(_behind(transport, large))
        for payload in (SMALL, IMAGE):
            yield [
                _point("early", transport, payload, x, f"announced {when}", 2, early=not x, in_place=True)
                for x, when in ((0, "early"), (1, "when ready"))
            ]


def _small() -> Iterator[Entry]:
    one: dict[str, Any] = {"tokens": 1, "count": 200, "in_place": True, "pool_tokens": 16, "block_tokens": 1}
    many: dict[str, Any] = {"tokens": 2, "count": 256, "at_once": 64, "pool_tokens": 2048}
    for transport in TRANSPORTS:
        yield _many("small", transport, 1, "1 token, one after another", "OneByOne", ONE, **one)
    for transport in TRANSPORTS:
        yield _many("small", transport, 64, "64 KiB, 64 at once", "AtOnce", TWO, **many)


def _trust() -> Iterator[Entry]:
    """Yields one token over tcp with what strangers are kept out by: on open connections, and with connecting."""
    one: dict[str, Any] = {"tokens": 1, "count": 200, "in_place": True, "pool_tokens": 16, "block_tokens": 1}
    for x, (trust, words) in enumerate(TRUSTS.items()):
        yield _many("trust", "tcp", x, f"1 token, {words}", "OneByOne", ONE, trust=trust, **one)
    fresh: dict[str, Any] = {"early": False, "fresh": True, "in_place": True}
    for x, (trust, words) in enumerate(TRUSTS.items()):
        yield _point("connect", "tcp", ONE, x, f"connecting and 1 token, {words}", 2, trust=trust, **fresh)


def _rooms() -> Iterator[Entry]:
    one: dict[str, Any] = {"tokens": 1, "count": 100, "in_place": True, "block_tokens": 1, "settings": QUIET}
    for n in ROOMS:
        words, pool = f"1 token, {n:,} other rooms open", n * 9 // 8 + 16
        yield _many("rooms", TRANSPORTS[0], n, words, "OneByOne", ONE, pool_tokens=pool, open=n, **one)


def _pools(transport: str, large: Payload) -> Iterator[Entry]:
    for share in POOLS:
        setting = {"pool_tokens": max(1, round(large.tokens * share)), "block_tokens": max(1, large.tokens // 400)}
        yield _point("pool", transport, large, share, f"pool {share:g}", 2 + share, **setting)


def _concurrency(transport: str) -> Iterator[Entry]:
    for n in COUNTS:
        setting = {"rooms": [EQUAL.tokens] * n, "pool_tokens": EQUAL_POOL, "block_tokens": 8}
        copies = 2 + n + EQUAL_POOL / EQUAL.tokens
        yield _point("concurrency", transport, EQUAL, n, f"{n} at once", copies, **setting)


def _behind(transport: str, large: Payload) -> Iterator[Entry]:
    pool = max(1, large.tokens // 3)
    options: dict[str, Any] = {"tokens": SMALL.tokens, "count": BEHIND, "pool_tokens": pool}
    yield _many("behind", transport, 0, f"{SMALL.name} alone", "OneByOne", SMALL, **options)
    words = f"{SMALL.name} behind {large.name}"
    yield _many("behind", transport, 1, words, "OneByOne", large, large=True, **options)


def _point(sweep: str, transport: str, payload: Payload, x: float, words: str, copies: float, **options: Any) -> Entry:
    full = {"transport": transport, "mode": "verified", "in_place": False} | options
    need = TRUST_NEEDS[options.get("trust", "")]
    candidate = Candidate(f"{sweep}/{transport}/{x:g}", f"{transport}, {words}", "ours", OURS, full, need)
    return Entry(candidate, payload, sweep, copies)


def _many(sweep: str, transport: str, x: int, words: str, ends: str, payload: Payload, **options: Any) -> Entry:
    """Returns a point with many transfers a round (:mod:`.small`)."""
    full = {"transport": transport, "mode": "verified"} | options
    need = TRUST_NEEDS[options.get("trust", "")]
    candidate = Candidate(f"{sweep}/{transport}/{x}", f"{transport}, {words}", "ours", f"{MANY}:{ends}", full, need)
    return Entry(candidate, payload, sweep, 2 + options["pool_tokens"] / payload.tokens)
