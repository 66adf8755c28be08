"""A whole soak: batches of rooms while connections are cut, reset and damaged, samples in between, and the checks."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from embferry.testing.stream_faults import Fault, Kind
from tests.transfer.soak.pair import ROLES, Pair

WARM_UP = 5
"""Batches until what a process holds is compared with later."""
GROWTH_BYTES = 24 << 20
"""Growth of a process that counts as noise of its allocators: 768 blocks."""
SETTLE_SECONDS = 60.0
KINDS: tuple[Kind, ...] = ("cut", "reset", "flip")
CONTROL_BYTES, DATA_BYTES = 100, 40_000
"""Bytes of a room, about: a fault strikes at one of those of a batch. The other direction carries less."""


@dataclass
class Soak:
    """A run, and what was seen.

    Attributes:
        batch: Rooms after which both processes are looked at, and their connections struck anew.
        samples: What both processes hold after each batch, with the number of transfers so far and the seconds.
        said: What each end says of all its rooms.
        strikes: How often a connection was struck, by what and kind of fault.
    """

    pair: Pair
    seed: int
    batch: int = 100
    samples: list[dict[str, Any]] = field(default_factory=list)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    strikes: Counter[str] = field(default_factory=Counter)
    done: int = 0

    def run(self, transfers: int, progress: Callable[[], object] = lambda: None) -> None:
        """Runs so many transfers more, in batches.

        Raises:
            AssertionError: A byte differs, or a transfer has failed that nothing had aborted.
        """
        began, last = time.monotonic(), transfers + self.done
        before = self.samples[-1]["seconds"] if self.samples else 0.0
        while self.done < last:
            count = min(self.batch, last - self.done)
            self._strike(count)
            self.said = self.pair.run(self.done + 1, count)
            self._count()
            self.done += count
            self._sample(before + time.monotonic() - began)
            progress()
            wrong = [problem for said in self.said.values() for problem in said["wrong"]]
            assert not wrong, wrong[:5]

    def check(self) -> None:
        """Checks that both processes hold what they held after the warm-up.

        Raises:
            AssertionError: One has more descriptors or threads, or has grown.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while problems := self._grown():
            assert time.monotonic() < deadline, problems
            time.sleep(0.1)

    def result(self) -> dict[str, Any]:
        """Returns everything, for a file."""
        outcomes = {role: said["outcomes"] for role, said in self.said.items()}
        refused = self.said["receiving"]["refused"]
        return {
            "seed": self.seed,
            "transfers": self.done,
            "outcomes": outcomes,
            "refused_allocations": refused,
            "strikes": dict(self.strikes),
            "samples": self.samples,
        }

    def _strike(self, rooms: int) -> None:
        """Arms a fault for the control connections and one for the data connections of the next rooms."""
        draw = random.Random(f"{self.seed} batch {self.done}")
        for proxy, most in ((self.pair.control, CONTROL_BYTES), (self.pair.data, DATA_BYTES)):
            toward = draw.choice(("upstream", "clients"))
            at = draw.randrange(most * rooms if toward == "upstream" else most * rooms // 100)
            proxy.arm(Fault(draw.choice(KINDS), toward, at, bit=draw.randrange(8)))  # type: ignore[arg-type]

    def _count(self) -> None:
        for name, proxy in (("control", self.pair.control), ("data", self.pair.data)):
            self.strikes[name] += proxy.struck.is_set()

    def _sample(self, seconds: float) -> None:
        signs = {role: asdict(signs) for role, signs in self.pair.signs().items()}
        self.samples.append({"transfers": self.done, "seconds": round(seconds, 3), **signs})

    def _grown(self) -> list[str]:
        first, now = self.samples[min(WARM_UP, len(self.samples)) - 1], self.pair.signs()
        found = []
        for role in ROLES:
            before, after = first[role], asdict(now[role])
            found += [f"{role}: {before[n]} → {after[n]} {n}" for n in ("fds", "threads") if after[n] > before[n]]
            if after["rss"] > before["rss"] + GROWTH_BYTES:
                found.append(f"{role}: {before['rss'] >> 20} → {after['rss'] >> 20} MiB")
        return found
