"""Candidates of the comparison. A new one is a line here and a file in ``peers/``."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from embferry.transports.registry import TRANSPORTS

from .library import MODES
from .results import Kind

NEEDS = {
    "mooncake": (
        ("mooncake",),
        "pip install 'embferry[mooncake]'; on Debian apt-get install libibverbs1 libnuma1 libcurl4",
    ),
    "nixl": (("nixl_cu12", "nixl_cu13", "nixl"), "pip install 'embferry[nixl]'"),
    "safetensors": (("safetensors",), "pip install 'embferry[bench]'"),
}
"""Modules, one of which must be installed, and how to install one."""


class Candidate(msgspec.Struct, frozen=True):
    key: str
    """Its name for ``--only`` and in the results."""
    label: str
    kind: Kind
    factory: str
    options: dict[str, Any] = {}
    need: str = ""
    """A key of :data:`NEEDS`; empty if nothing has to be installed."""


def missing(candidate: Candidate) -> str | None:
    """Returns what has to be installed before the candidate can run; None if nothing."""
    modules, install = NEEDS.get(candidate.need, ((), ""))
    if not modules or any(map(importlib.util.find_spec, modules)):
        return None
    return f"{' or '.join(modules)} is not installed: {install}"


def matching(patterns: list[str]) -> list[Candidate]:
    """Returns the candidates whose key matches a pattern or begins with it (``shm``, ``tcp/verified``, ``zeromq*``).

    Raises:
        ValueError: a pattern matches no candidate.
    """
    chosen = []
    for pattern in patterns:
        found = [c for c in ALL if fnmatchcase(c.key, pattern) or f"{c.key}/".startswith(f"{pattern.rstrip('/')}/")]
        if not found:
            raise ValueError(f"no candidate is called {pattern!r}; choose from {', '.join(c.key for c in ALL)}")
        chosen += found
    return [c for c in ALL if c in chosen]


def _own(transport: str, mode: str, place: str) -> Candidate:
    options = {"transport": transport, "mode": mode, "in_place": place == "in-place"}
    label = f"{transport}, {'verified, checksum ahead' if mode == 'ahead' else mode}, {place.replace('-', ' ')}"
    need = transport if transport in NEEDS else ""
    return Candidate(f"{transport}/{mode}/{place}", label, "ours", f"{__package__}.library:Embferry", options, need)


def _peer(key: str, label: str, kind: Kind, factory: str, need: str = "", **options: Any) -> Candidate:
    return Candidate(key, label, kind, f"{__package__}.peers.{factory}", options, need)


ALL = (
    _peer("copy/private", "memory copy, private memory", "limit", "copying:Copy", to="private"),
    _peer("copy/shared", "memory copy, shared memory", "limit", "copying:Copy", to="shared"),
    _peer("copy/fresh", "memory copy, fresh array", "limit", "copying:Copy", to="fresh"),
    _peer("socket", "raw socket (sendall / recv_into)", "limit", "sockets:Socket"),
    *(_own(transport, mode, place) for transport in TRANSPORTS for place in ("in-place", "gathered") for mode in MODES),
    _peer("direct/mooncake", "Mooncake over TCP, directly", "engine", "mooncake:Mooncake", "mooncake"),
    _peer(
        "direct/mooncake-tuned",
        "Mooncake over TCP, directly, our settings",
        "engine",
        "mooncake:Mooncake",
        "mooncake",
        tuned=True,
    ),
    _peer("direct/nixl", "NIXL (UCX), directly", "engine", "nixl:Nixl", "nixl"),
    _peer("zeromq/copied", "ZeroMQ multipart, copied to a tensor", "peer", "zeromq:ZeroMQ"),
    _peer("zeromq/in-place", "ZeroMQ multipart, used in its frame", "peer", "zeromq:ZeroMQ", in_place=True),
    _peer("files", "safetensors file in a shared folder", "peer", "files:Files", "safetensors"),
    _peer("http-get", "HTTP GET (http.server / http.client)", "peer", "httpget:HttpGet"),
)
BY_KEY = {candidate.key: candidate for candidate in ALL}
