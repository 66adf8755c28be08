"""Candidates of the comparison. A new one is a line here and two classes in ``peers``."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from embferry.transports.registry import TRANSPORTS

from .library import MODES
from .results import Kind
from .trust import TRUSTS

NEEDS = {
    "mooncake": (
        ("mooncake",),
        "pip install 'embferry[mooncake]'; on Debian apt-get install libibverbs1 libnuma1 libcurl4",
    ),
    "nixl": (("nixl_cu12", "nixl_cu13", "nixl"), "pip install 'embferry[nixl]'"),
    "safetensors": (("safetensors",), "pip install 'embferry[bench]'"),
    "certificates": (("cryptography",), "pip install 'embferry[tls]'"),
}
"""Modules, one of which must be installed, and how to install one."""
TRUST_NEEDS = {"": "", "key": "", "tls": "certificates"}
OURS = f"{__package__}.library:Embferry"


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


def matches(key: str, pattern: str) -> bool:
    """Returns whether a key matches a pattern or begins with it (``shm``, ``tcp/verified``, ``zeromq*``)."""
    return fnmatchcase(key, pattern) or f"{key}/".startswith(f"{pattern.rstrip('/')}/")


def _own(transport: str, mode: str, place: str) -> Candidate:
    options = {"transport": transport, "mode": mode, "in_place": place == "in-place"}
    label = f"{transport}, {'verified, checksum ahead' if mode == 'ahead' else mode}, {place.replace('-', ' ')}"
    return Candidate(f"{transport}/{mode}/{place}", label, "ours", OURS, options, transport)


def _trusted(trust: str) -> Candidate:
    """Returns tcp's most usual variant with a cluster key, or with certificates too."""
    options = {"transport": "tcp", "mode": "verified", "in_place": True, "trust": trust}
    label = f"tcp, verified, in place, {TRUSTS[trust]}"
    return Candidate(f"tcp/verified/in-place/{trust}", label, "ours", OURS, options, TRUST_NEEDS[trust])


def _peer(key: str, label: str, kind: Kind, prefix: str, need: str = "", **options: Any) -> Candidate:
    return Candidate(key, label, kind, f"{__package__}.peers:{prefix}", options, need)


_TUNED = "Mooncake over TCP, directly, our settings"
ALL = (
    _peer("copy/private", "memory copy, private memory", "limit", "Copy", to="private"),
    _peer("copy/shared", "memory copy, shared memory", "limit", "Copy", to="shared"),
    _peer("copy/fresh", "memory copy, fresh array", "limit", "Copy", to="fresh"),
    _peer("socket", "raw socket (sendall / recv_into)", "limit", "Socket"),
    *(_own(transport, mode, place) for transport in TRANSPORTS for place in ("in-place", "gathered") for mode in MODES),
    _trusted("key"),
    _trusted("tls"),
    _peer("direct/mooncake", "Mooncake over TCP, directly", "engine", "Mooncake", "mooncake"),
    _peer("direct/mooncake-tuned", _TUNED, "engine", "Mooncake", "mooncake", tuned=True),
    _peer("direct/nixl", "NIXL (UCX), directly", "engine", "Nixl", "nixl"),
    _peer("zeromq/copied", "ZeroMQ multipart, copied to a tensor", "peer", "ZeroMQ"),
    _peer("zeromq/in-place", "ZeroMQ multipart, used in its frame", "peer", "ZeroMQ", in_place=True),
    _peer("files", "safetensors file in a shared folder", "peer", "Files", "safetensors"),
    _peer("http-get", "HTTP GET (http.server / http.client)", "peer", "HttpGet"),
)
