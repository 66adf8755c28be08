"""``make relay``: every fault in every hop of a real stack, and flipped bits at random places."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.serve.relay.stack import relayed_stack
from tests.serve.relay.table import HOPS, combinations, flips
from tests.serve.relay.trial import Asked, Trials


def main() -> int:
    parser = argparse.ArgumentParser(prog="make relay", description=__doc__)
    parser.add_argument("--transport", nargs="+", default=["tcp", "http"], choices=list(HOPS))
    parser.add_argument("--hop", nargs="+", default=None)
    parser.add_argument("--flips", type=int, default=50, help="in each direction of each hop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends everything, as Ctrl-C does
    try:
        return tried(options)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130


def tried(options: argparse.Namespace) -> int:
    asked, failed = Asked.make(), 0
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for transport in options.transport:
            logs = Path(folder) / "log"
            with relayed_stack(transport, logs) as stack:
                trials = Trials(stack, asked)
                trials.prepare()
                for combination in [*combinations(transport), *flips(transport, options.flips, options.seed)]:
                    if options.hop and combination.hop not in options.hop:
                        continue
                    outcome, problem = trials.run(combination)
                    code = outcome.partition(":")[0] or "right"
                    outcomes[combination.hop, combination.fault, code] += 1
                    if problem:
                        failed += 1
                        print(f"\n{combination}: {problem}")
                    print(f"\r\033[K{outcomes.total()}: {combination}: {code}", end="", flush=True)
            if failed:
                print("\nthe last lines of the log:", logs.read_text()[-3000:], sep="\n")
    print("\n\nhop        fault            outcomes")
    for hop, fault in dict.fromkeys((hop, fault) for hop, fault, _ in outcomes):
        mine = {code: times for (h, f, code), times in outcomes.items() if (h, f) == (hop, fault)}
        print(f"{hop:10} {fault:16} {', '.join(f'{times} {code}' for code, times in sorted(mine.items()))}")
    print(f"\n{outcomes.total()} combinations, {failed} not as they must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
