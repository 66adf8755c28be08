"""Takes the picture of a benchmark's page that the documentation has.

    python scripts/picture_bench.py serve.html [--into FOLDER] [--all]

``serve.html`` is what ``embferry bench serve --compare --side-by-side`` has written. Needs Playwright and Chromium, as
``make test-browser`` does. ``--all`` takes the whole page in light and dark, wide and narrow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

from picture_page import ARGUMENTS, CHROMIUM, NARROW, ROOT, Shot, take

DOCUMENTED = [Shot("bench-page", {"width": 1200, "height": 1010}, "light")]
ALL = [
    Shot(f"bench-{name}-{scheme}", size, scheme)
    for name, size in (("wide", {"width": 1440, "height": 900}), ("narrow", NARROW))
    for scheme in ("light", "dark")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    parser.add_argument("--all", action="store_true")
    chosen = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        for shot in ALL if chosen.all else DOCUMENTED:
            page = browser.new_page(viewport=shot.size, color_scheme=shot.scheme)
            page.goto(chosen.page.resolve().as_uri())
            take(chosen.into, [(shot, page)], whole=chosen.all)
        browser.close()


if __name__ == "__main__":
    main()
