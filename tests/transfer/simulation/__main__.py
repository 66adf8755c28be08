"""Tells stories until one breaks an invariant: ``python -m tests.transfer.simulation --seeds 1000``."""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback

from .simulation import failure
from .story import Story, draw, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many stories to tell")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--story", help="a story to tell again, as it was printed")
    options = parser.parse_args()
    gc.freeze()  # a story's cycles are searched for, what was imported is not
    if options.story:
        return tell(Story.parse(options.story))
    try:
        return search(options.first, options.seeds)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130


def search(first: int, seeds: int) -> int:
    """Tells the stories of these seeds, and prints the smallest form of the first that fails."""
    begun = time.monotonic()
    for count, seed in enumerate(range(first, first + seeds), 1):
        story = draw(seed)
        error = failure(story)
        if error is not None:
            print(f"\nseed {seed} fails: {error!r}\nlooking for the smallest story that fails in this way…", flush=True)
            like = kind(error)
            small = shrink(story, lambda s, like=like: (e := failure(s)) is not None and kind(e) == like)  # type: ignore[misc]
            tell(small)
            print(f"{small}\ntells it again with: python -m tests.transfer.simulation --story '…'")
            return 1
        if count % 50 == 0 or count == seeds:
            rate = count / (time.monotonic() - begun)
            print(f"\r{count} of {seeds} stories, {rate:.0f} a second", end="", flush=True)
    print("; all end as they must")
    return 0


def kind(error: Exception) -> str:
    """Returns what an error says, without the numbers in it."""
    return re.sub(r"\d+", "N", f"{type(error).__name__} {error}"[:80])


def tell(story: Story) -> int:
    """Tells one story, and prints what breaks."""
    error = failure(story)
    if error is None:
        print("this story ends as it must")
        return 0
    traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
