"""One idea a file: a Python file of more than 400 lines holds two, unless it is listed here with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "tests", "training", "scripts", "examples", "benchmarks")
LIMIT = 400
LONGER = {
    "src/embferry/protocol/receiver.py": 600,  # a pure state machine: everything that affects its state
    "src/embferry/protocol/sender.py": 600,  # likewise
    "src/embferry/serve/config.py": 600,  # one table: every setting with its description
}
"""Files that may be longer, and how long."""


def too_long(root: Path) -> list[tuple[str, int]]:
    """Returns (file, lines) for every file over its limit, the longest first."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    lines = [(str(path.relative_to(root)), len(path.read_text().splitlines())) for path in files]
    return sorted((entry for entry in lines if entry[1] > LONGER.get(entry[0], LIMIT)), key=lambda entry: -entry[1])


def main(root: Path = ROOT) -> int:
    found = too_long(root)
    for name, count in found:
        print(f"{name}: {count} lines; the limit is {LONGER.get(name, LIMIT)}. Which second idea is in it?")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
