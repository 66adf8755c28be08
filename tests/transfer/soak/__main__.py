"""``make soak``: a great many transfers in one pair of processes; nothing may be lost, damaged or left behind."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.transfer.soak.pair import running_pair
from tests.transfer.soak.plot import svg
from tests.transfer.soak.soak import Soak

BATCH, SAMPLES = 100, 200
"""Transfers between two samples at least, and samples at most."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--transfers", type=int, default=100_000)
    parser.add_argument("--transport", default="shm", choices=("shm", "tcp"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=Path("soak"), help="the result's files, without .json and .svg")
    parser.add_argument("--plot", type=Path, nargs="+", help="only draws the results in these files, together")
    options = parser.parse_args()
    if options.plot:
        options.result.with_suffix(".svg").write_text(svg([json.loads(path.read_text()) for path in options.plot]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends everything, as Ctrl-C does
    status = 0
    try:
        with running_pair(options.transport, options.seed) as pair:
            batch = max(BATCH, options.transfers // SAMPLES)
            soak, began = Soak(pair, options.seed, batch), time.monotonic()

            def show() -> None:
                pace = soak.done / (time.monotonic() - began)
                print(f"\r{soak.done} of {options.transfers} transfers, {pace:.0f} a second ", end="", flush=True)

            try:
                soak.run(options.transfers, show)
                soak.check()
            except KeyboardInterrupt:
                status = 130
            except Exception:  # noqa: BLE001 - what was seen until then is written all the same
                traceback.print_exc()
                status = 1
            report(soak, options)
    except KeyboardInterrupt:
        status = 130
    print("stopped" if status == 130 else "failed" if status else "as it must be")
    return status


def report(soak: Soak, options: argparse.Namespace) -> None:
    """Writes the result and its picture, and prints the figures."""
    print()
    if not soak.samples:
        return
    result = described(soak.result(), options.transport)
    options.result.with_suffix(".json").write_text(json.dumps(result) + "\n")
    options.result.with_suffix(".svg").write_text(svg([result]))
    print(*(f"{key}: {value}" for key, value in result.items() if key != "samples"), sep="\n")
    first, last = soak.samples[min(4, len(soak.samples) - 1)], soak.samples[-1]
    for role in ("sending", "receiving"):
        a, b = first[role], last[role]
        memory = f"{a['rss'] / 2**20:.1f} → {b['rss'] / 2**20:.1f} MiB"
        print(f"{role}: {memory}, {a['fds']} → {b['fds']} descriptors, {a['threads']} → {b['threads']} threads")


def described(result: dict[str, Any], transport: str) -> dict[str, Any]:
    """Returns the result with what it was measured on."""
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    command = f"make soak TRANSFERS={result['transfers']} TRANSPORT={transport}"
    today = datetime.date.today().isoformat()
    return {"date": today, "machine": machine, "command": command, "transport": transport, **result}


if __name__ == "__main__":
    sys.exit(main())
