"""Kills and stops every process of a stack in the middle of transfers, and checks that nothing is lost.

Each round strikes the processes of a group once in each way, while clients ask. Then the stack has to be as before:
every answer right, every block free, and of each process that is not killed in this group no more descriptors and
threads than after the warm-up, which is a round of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from embferry.serve.off_loop import JOBS
from tests.serve.workers.endurance.questions import BOUND, Clients, Outcome, questions
from tests.serve.workers.endurance.stack import Signs, Stack
from tests.serve.workers.test_processes import START, wait
from tests.serve.workers.test_stalled_processes import stopped

NAMES = ("supervisor", "bootstrap", "router", "encode-0", "encode-1", "language-0", "language-1")
GROUPS = (("encode-0", "language-0"), ("bootstrap", "router"), ("supervisor",))
"""The processes that are struck at one stack: what the others hold shows what a strike has cost them."""
KINDS = ("kill", "stop")
STOPS = (1.5, 6.0)
"""Seconds of a stop, in turn: within the time-outs of the stack (5 s), and beyond them."""
IDLE_SECONDS, SETTLE_SECONDS = 8.0, 30.0
"""Until connections that idle have been closed (5 s) before the first measurement, and at most before the others."""
NOISE_BYTES = 24 << 20
"""Growth of a process's resident memory that counts as noise of its allocators."""
BURST = 10
"""Questions at once after a round: each one as a whole and as a stream."""
POOLED = {"router": JOBS + min(32, (os.cpu_count() or 1) + 4)}
"""Threads that pools may still start after the warm-up: the router's start one when two pieces of work coincide."""
MEET_SECONDS = 60.0
"""Until all workers have met: the router asks a worker that has failed last, for 10 s."""
EXPLAINED = {
    "peer_gone", "worker_failed", "worker_ending", "transport_error", "lease_expired", "no_worker", "transport_stalled",
}  # fmt: skip
"""Codes that may be the consequence of a strike; all of them may be repeated."""
ENDING = {"supervisor": {"connection", "capacity_exhausted"}, "router": {"connection"}}
"""More codes, by process: the client's connection broke, or a worker that is about to end refuses requests."""
UNHARMED = {("bootstrap", "kill"), ("bootstrap", "stop"), ("supervisor", "stop"), ("router", "stop")}
"""Strikes after which requests are served as before."""


@dataclass
class Strike:
    """One strike, until the stack was whole again, and the requests meanwhile. Times in monotonic seconds."""

    name: str
    kind: str
    outcomes: list[Outcome]
    begun: float = 0.0
    ended: float = 0.0

    def judge(self) -> None:
        """Raises AssertionError at a request that did not end as it must."""
        for outcome in self.outcomes:
            what = f"{outcome.code} after {outcome.seconds:.1f} s ({self.kind} of {self.name}): {outcome.detail}"
            assert outcome.seconds < BOUND, f"a request hangs: {what}"
            if outcome.code:
                assert (self.name, self.kind) not in UNHARMED, f"an error although nothing was lost: {what}"
                assert outcome.code in EXPLAINED | ENDING.get(self.name, set()), f"an unexplained error: {what}"
                assert outcome.ended >= self.begun, f"an error before the strike: {what}"
                assert outcome.begun <= self.ended, f"an error when the stack was whole again: {what}"


class Endurance:
    """The strikes at one stack, and what was seen."""

    def __init__(self, stack: Stack, clients: Clients, names: list[str], kinds: list[str]) -> None:
        self.stack, self.clients = stack, clients
        self.plan = [(name, kind) for kind in kinds for name in names]
        killed = {name for name, kind in self.plan if kind == "kill"}
        self.survivors = [] if "supervisor" in killed else [name for name in NAMES if name not in killed]
        self.strikes: list[Strike] = []
        self.signs: list[dict[str, Signs]] = []
        """The signs of the idle stack, after the warm-up and after each round."""

    def run(self, first: int, times: int) -> None:
        for number in [0, *range(first, first + times)]:  # the warm-up, and the rounds
            for name, kind in self.plan:
                self._strike(name, kind, STOPS[number % len(STOPS)])
            self._ask_all()
            if self.signs:
                self._wait_settled()
            else:
                time.sleep(IDLE_SECONDS)
            self.signs.append(self.stack.signs())

    def _strike(self, name: str, kind: str, seconds: float) -> None:
        """Strikes when a transfer is under way, waits until the stack is whole, and judges the requests."""
        with self.clients.asking() as outcomes:
            wait(lambda: self.stack.under_way(name), f"a transfer under way for {name}", BOUND)
            view, strike = self.stack.processes()[name], Strike(name, kind, outcomes, time.monotonic())
            if kind == "stop":
                with stopped(view):
                    time.sleep(seconds)
            else:
                os.kill(view.pid, signal.SIGKILL)
                if name == "supervisor":
                    self.stack.restart()
                else:
                    wait(lambda: self.stack.processes()[name].starts > view.starts, f"another {name}", BOUND)
            wait(self.stack.recovered, f"all processes after the {kind} of {name}", START)
            strike.ended = time.monotonic()
        strike.judge()
        wait(lambda: not self.stack.held(), "no block in use and no request held", SETTLE_SECONDS)
        self.strikes.append(strike)
        codes = Counter(outcome.code or "right" for outcome in outcomes)
        done = f"strike {len(self.strikes)}: {kind} {name}, whole after {strike.ended - strike.begun:.1f} s"
        print(f"\r\033[K{done}, requests: {dict(codes)}", end="", flush=True)

    def _ask_all(self) -> None:
        """Asks until every encode worker has met every language worker; the answers have to be right."""
        deadline = time.monotonic() + MEET_SECONDS
        self._ask_at_once()
        while not self.stack.acquainted():
            assert time.monotonic() < deadline, "some workers have not met"
            self._ask_at_once()

    def _ask_at_once(self) -> None:
        with ThreadPoolExecutor(BURST) as pool:
            for outcome in pool.map(self.clients.ask, range(BURST)):
                assert not outcome.code, f"no right answer afterwards: {outcome}"

    def _wait_settled(self) -> None:
        """Waits until every process that was not killed has as many descriptors and threads as after the warm-up."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self.stack.signs()
            pairs = [(name, self.signs[0][name], now[name]) for name in self.survivors]
            assert all(a.pid == b.pid for _, a, b in pairs), f"a process was not killed and has died: {pairs}"
            assert all(b.rss - a.rss < NOISE_BYTES for _, a, b in pairs), f"a process has grown: {pairs}"
            if all(b.fds <= a.fds and b.threads <= a.threads + POOLED.get(name, 0) for name, a, b in pairs):
                return
            assert time.monotonic() < deadline, f"more descriptors or threads than after the warm-up: {pairs}"
            time.sleep(0.1)

    def report(self) -> None:
        strikes = self.strikes[len(self.plan) :]
        print("\n\nstrike            times  right  errors; slowest request; whole again after (median, longest)")
        for name, kind in self.plan:
            mine = [strike for strike in strikes if (strike.name, strike.kind) == (name, kind)]
            if not mine:
                continue
            outcomes = [outcome for strike in mine for outcome in strike.outcomes]
            codes = Counter(outcome.code for outcome in outcomes)
            errors = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()) if code) or "none"
            slowest, back = max(outcome.seconds for outcome in outcomes), [s.ended - s.begun for s in mine]
            after = f"{statistics.median(back):.1f} s, {max(back):.1f} s"
            print(f"{kind} {name:12} {len(mine):5}  {codes['']:5}  {errors}; {slowest:.1f} s; {after}")
        if not strikes or not self.survivors:
            return
        print("\nprocess       descriptors  threads    MiB resident    KiB a strike")
        for name in self.survivors:
            a, b = self.signs[0][name], self.signs[-1][name]
            fds, threads, rss = f"{a.fds} → {b.fds}", f"{a.threads} → {b.threads}", f"{a.mib:.1f} → {b.mib:.1f}"
            print(f"{name:12}  {fds:11}  {threads:9}  {rss:14}  {(b.mib - a.mib) * 1024 / len(strikes):+.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make endurance", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="how many rounds")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--transport", default="shm", help="shm or tcp")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="the processes to strike, as one group")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends everything, as Ctrl-C does
    try:
        asked = questions()
        for names in [options.only] if options.only else map(list, GROUPS):
            with Stack(options.transport) as stack:
                clients = Clients(asked, lambda stack=stack: stack.url, options.transport)  # type: ignore[misc]
                if endure(Endurance(stack, clients, names, options.kinds), options.first, options.times):
                    return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    return 0


def endure(endurance: Endurance, first: int, times: int) -> int:
    try:
        endurance.run(first, times)
    except Exception:  # noqa: BLE001 - the log of the stack says why
        traceback.print_exc()
        print("the last lines of the log:", *map(str.rstrip, endurance.stack.serve.lines[-60:]), sep="\n")
        return 1
    finally:
        endurance.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
