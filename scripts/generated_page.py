"""The end of each script that writes a page from the code."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, wanted: str) -> int:
    """Writes a page. With ``--check`` on the command line, only compares it.

    Returns:
        The exit status: 1 if the page is stale.
    """
    if "--check" not in sys.argv[1:]:
        page.write_text(wanted, "utf-8")
    elif not page.is_file() or page.read_text("utf-8") != wanted:
        print(f"{page} is not what the code says; run python {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0
