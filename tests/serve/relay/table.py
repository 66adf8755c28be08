"""The combinations: in which hop, in which direction, which fault."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from embferry.testing.stream_faults import Fault, Toward

HOPS = {
    "tcp": ("control", "data", "encode", "language", "bootstrap"),
    "http": ("data",),
    "mooncake": ("data",),
    "nixl": ("data",),
}
"""Hops that are tried in a stack of each transport: the others are the same in all. Of an engine: its side channel."""
ENGINES = ("mooncake", "nixl")
DIRECTIONS: tuple[Toward, ...] = ("upstream", "clients")
BYTES = 7
"""Bytes that are repeated, lost or swapped: no multiple of anything."""
FAULTS = {
    "flip": Fault("flip", bit=3),
    "repeat bytes": Fault("duplicate", length=BYTES),
    "lose bytes": Fault("drop", length=BYTES),
    "swap bytes": Fault("reorder", length=BYTES),
    "swallow": Fault("swallow"),
    "delay": Fault("delay", seconds=0.5),
    "stall": Fault("stall"),
    "cut": Fault("cut"),
    "reset": Fault("reset"),
    "repeat message": Fault("duplicate", messages=True),
    "lose message": Fault("drop", messages=True),
}
SWAP = "swap messages"
"""Makes sense only where messages do not wait for each other: on the control plane."""
TRIES = 5
"""Questions within which a fault has to strike: it may need a new connection, or a message that is rare."""
NAMED = {
    "worker_failed",
    "no_worker",
    "network_damage",
    "peer_gone",
    "transport_error",
    "transport_stalled",
    "lease_expired",
    "integrity_error",
    "remote_protocol_error",
}
"""Codes that name a damaged or broken hop as the cause. Any other blames the client or hides a bug."""
PLACES = (0.0, 0.3, 0.9)
"""Where a fault strikes: a share of what a direction carries for one question."""


@dataclass(frozen=True)
class Combination:
    """One line of the table. ``share``: of the bytes, or of the messages, that come before."""

    transport: str
    hop: str
    fault: str
    toward: Toward
    share: float

    def __str__(self) -> str:
        arrow = "to the listener" if self.toward == "upstream" else "from the listener"
        return f"{self.fault}, {self.hop} over {self.transport}, {arrow}, at {self.share:.3f}"

    def at(self, carried: int) -> Fault:
        """Returns the fault, for a direction that carries so many bytes for a question."""
        if self.fault == SWAP:
            return Fault("reorder", self.toward, messages=True)
        fault = FAULTS[self.fault]
        at = int(self.share * max(0, carried - 2 * BYTES))
        if fault.messages:  # a connection over HTTP may carry one only
            at = 1 if self.share and self.hop in ("control", "data") else 0
        return replace(fault, toward=self.toward, at=at)


def combinations(transport: str, places: tuple[float, ...] = PLACES) -> Iterator[Combination]:
    for hop in HOPS[transport]:
        for toward in DIRECTIONS:
            for fault in FAULTS:
                for share in places:
                    yield Combination(transport, hop, fault, toward, share)
            if hop == "control":
                yield Combination(transport, hop, SWAP, toward, 0.0)


def flips(transport: str, times: int, seed: int) -> Iterator[Combination]:
    """Returns flipped bits at random places of every hop, in both directions."""
    draw = random.Random(seed)
    for hop in HOPS[transport]:
        for toward in DIRECTIONS:
            for _ in range(times):
                yield Combination(transport, hop, "flip", toward, draw.random())
