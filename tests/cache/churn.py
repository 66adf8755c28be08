"""A process that writes and reads embeddings in a folder until it is told to stop, or is killed.

    python -m tests.cache.churn FOLDER SEED MAX_BYTES

It prints a line once it has begun, and a summary at its end, which comes when its standard input is closed.
"""

from __future__ import annotations

import json
import random
import select
import sys
from collections import Counter
from pathlib import Path

from embferry.cache.entry import Damaged
from embferry.cache.folder import FolderStore

from .samples import has, keep

NAMES, TOKENS = 40, 2000


def main(folder: str, seed: int, max_bytes: int) -> None:
    store, chance = FolderStore(Path(folder), max_bytes), random.Random(seed)
    seen: Counter[str] = Counter()
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = chance.randrange(NAMES)
        try:
            if has(store, name, TOKENS):  # fails if it is a wrong one
                seen["hits"] += 1
            else:
                seen["misses"] += 1
                seen["written"] += bool(keep(store, name, TOKENS))
        except Damaged:
            seen["damaged"] += 1
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
