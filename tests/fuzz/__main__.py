"""Runs inputs until one shows a fault: ``python -m tests.fuzz --inputs 100000 --target tcp``."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

from embferry.protocol.errors import shown

from .engine import Target, draw, failure, failure_of_pieces, failure_of_seed
from .raw import Pieces
from .shrink import kind, shrink
from .targets import TARGETS

BLOCK = 500
MOST_PRINTED = 4000
"""Characters of an input that are printed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many inputs each target gets")
    parser.add_argument("--target", help=f"one of {', '.join(TARGETS)}; all if it is left out")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--replay", help="an input as it was printed, or @ and a file with it")
    options = parser.parse_args()
    warnings.simplefilter("error")
    logging.disable()
    gc.freeze()  # the garbage of an input is searched for, what was imported is not
    names = [options.target] if options.target else list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(unknown)}")
    if options.replay is not None:
        text = Path(options.replay[1:]).read_text() if options.replay[:1] == "@" else options.replay
        return replay(TARGETS[names[0]], [bytes.fromhex(piece) for piece in text.split(",")])
    try:
        found = [search(name, options.first, options.inputs, options.jobs) for name in names]
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    return 1 if any(found) else 0


def search(name: str, first: int, inputs: int, jobs: int) -> bool:
    """Runs the inputs of these seeds, and prints the smallest form of the first that fails. Returns whether one did."""
    begun, done = time.monotonic(), 0
    with multiprocessing.Pool(jobs) as pool:
        for count, seed in pool.imap(partial(run_block, name, first + inputs), range(first, first + inputs, BLOCK)):
            if seed is not None:
                print(f"\r{name}: seed {seed} shows a fault; looking for the smallest input that does…", flush=True)
                return report(TARGETS[name], seed)
            done += count
            rate = done / (time.monotonic() - begun)
            print(f"\r{name}: {done} of {inputs} inputs, {rate:.0f} a second", end="", flush=True)
    print("; no fault", flush=True)
    return False


def run_block(name: str, end: int, first: int) -> tuple[int, int | None]:
    """Runs some inputs. Returns how many, and the seed of the first that fails."""
    target, seeds = TARGETS[name], range(first, min(first + BLOCK, end))
    return len(seeds), next((seed for seed in seeds if failure_of_seed(target, seed) is not None), None)


def report(target: Target, seed: int) -> bool:
    """Prints what the input of a seed shows, in its smallest form."""
    given = draw(target, seed)
    error = failure_of_seed(target, seed)
    if error is None:
        print("…but not in another process: something is kept between inputs")
    elif given.valid and failure(target, given) is not None:
        traceback.print_exception(error)
        print(f"a valid input of {target.name}: {replayable(given.pieces)}")
    else:
        like = kind(error)

        def fails(pieces: Pieces) -> bool:
            again = failure_of_pieces(target, pieces)
            return again is not None and kind(again) == like

        small = shrink(given.pieces, fails)
        traceback.print_exception(failure_of_pieces(target, small) or error)
        print(f"{shown(small, 1000)}\nagain: python -m tests.fuzz --target {target.name} --replay {replayable(small)}")
    return True


def replayable(pieces: Pieces) -> str:
    """Returns an input as ``--replay`` takes it. A long one is written to a file."""
    text = ",".join(piece.hex() for piece in pieces)
    if len(text) < MOST_PRINTED:
        return text
    with tempfile.NamedTemporaryFile("w", prefix="fuzz-", suffix=".txt", delete=False) as file:
        file.write(text)
    return f"@{file.name}"


def replay(target: Target, pieces: Pieces) -> int:
    """Runs one input, and prints what it shows."""
    error = failure_of_pieces(target, pieces)
    if error is None:
        print("this input is handled as documented")
        return 0
    traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
