"""Who takes part. One more is one line here and one file in ``peers/``."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from . import ours
from .results import Kind

PEERS = f"{__package__}.peers"


class Need(msgspec.Struct, frozen=True):
    """Packages, one of which must be there, and how to get one."""

    packages: tuple[str, ...]
    install: str


class Contestant(msgspec.Struct, frozen=True):
    key: str
    """What ``--only`` matches and other files refer to."""
    label: str
    kind: Kind
    factory: str
    options: dict[str, Any] = {}
    need: Need | None = None


def missing(contestant: Contestant) -> str | None:
    """Why it cannot take part here, and what would help; None: it can."""
    need = contestant.need
    if need is not None and not any(importlib.util.find_spec(package) for package in need.packages):
        return f"{' or '.join(need.packages)} is not installed: {need.install}"
    return ours.missing(contestant.options) if contestant.kind == "ours" else None


def matching(patterns: list[str]) -> list[Contestant]:
    """Those whose key matches a pattern, or begins with one that has no wildcard (``shm``, ``ours/tcp``, ``zeromq*``).

    :raises ValueError: nobody matches a pattern."""
    chosen = []
    for pattern in patterns:
        found = [c for c in ALL if _matches(c.key, pattern)]
        if not found:
            raise ValueError(f"nobody is called {pattern!r}; there are {', '.join(c.key for c in ALL)}")
        chosen += found
    return [c for c in ALL if c in chosen]


def _matches(key: str, pattern: str) -> bool:
    return fnmatchcase(key, pattern) or f"{key}/".startswith(f"{pattern.rstrip('/')}/")


MOONCAKE = Need(("mooncake",), "pip install 'embferry[mooncake]'; on Debian apt-get install libibverbs1")
NIXL = Need(("nixl_cu12", "nixl_cu13", "nixl"), "pip install 'embferry[nixl]'")
SAFETENSORS = Need(("safetensors",), "pip install 'embferry[bench]'")
_ENGINES = {"mooncake": MOONCAKE, "nixl": NIXL}
_PLACES = {"in-place": "in place", "gathered": "gathered"}
_MODE_LABELS = {"verified": "verified", "ahead": "verified, checksum ahead", "unverified": "unverified"}


def _own(transport: str, mode: str, place: str) -> Contestant:
    options = {"transport": transport, "mode": mode, "in_place": place == "in-place"}
    label = f"{transport}, {_MODE_LABELS[mode]}, {_PLACES[place]}"
    return Contestant(
        f"{transport}/{mode}/{place}", label, "ours", f"{__package__}.ours:Ours", options, _ENGINES.get(transport)
    )


OWN = tuple(_own(transport, mode, place) for transport in ours.TRANSPORTS for place in _PLACES for mode in ours.MODES)

LIMITS = (
    Contestant("copy/private", "memory copy, private memory", "limit", f"{PEERS}.copying:Copy", {"to": "private"}),
    Contestant("copy/shared", "memory copy, shared memory", "limit", f"{PEERS}.copying:Copy", {"to": "shared"}),
    Contestant("copy/fresh", "memory copy, fresh array", "limit", f"{PEERS}.copying:Copy", {"to": "fresh"}),
    Contestant("socket", "raw socket (sendall / recv_into)", "limit", f"{PEERS}.sockets:Socket"),
)
OTHERS = (
    Contestant("direct/mooncake", "Mooncake over TCP, directly", "engine", f"{PEERS}.mooncake:Mooncake", {}, MOONCAKE),
    Contestant(
        "direct/mooncake-tuned",
        "Mooncake over TCP, directly, our settings",
        "engine",
        f"{PEERS}.mooncake:Mooncake",
        {"tuned": True},
        MOONCAKE,
    ),
    Contestant("direct/nixl", "NIXL (UCX), directly", "engine", f"{PEERS}.nixl:Nixl", {}, NIXL),
    Contestant("zeromq/copied", "ZeroMQ multipart, copied to a tensor", "peer", f"{PEERS}.zeromq:ZeroMQ"),
    Contestant(
        "zeromq/in-place", "ZeroMQ multipart, used in its frame", "peer", f"{PEERS}.zeromq:ZeroMQ", {"in_place": True}
    ),
    Contestant("files", "safetensors file in a shared folder", "peer", f"{PEERS}.files:Files", {}, SAFETENSORS),
    Contestant("http-get", "HTTP GET (http.server / http.client)", "peer", f"{PEERS}.httpget:HttpGet"),
)
ALL = (*LIMITS, *OWN, *OTHERS)
BY_KEY = {contestant.key: contestant for contestant in ALL}
