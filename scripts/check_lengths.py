"""One idea a file: a Python file that passes 400 lines is two files."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "tests", "training", "scripts", "examples", "benchmarks")
LIMIT = 400


def too_long(root: Path) -> list[tuple[str, int]]:
    """(file, lines) for every file over the limit, the longest first."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    lines = [(str(path.relative_to(root)), len(path.read_text().splitlines())) for path in files]
    return sorted((entry for entry in lines if entry[1] > LIMIT), key=lambda entry: -entry[1])


def main(root: Path = ROOT) -> int:
    found = too_long(root)
    for name, count in found:
        print(f"{name}: {count} lines; the limit is {LIMIT}. What second idea is in it?")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
