"""Takes the picture of ``embferry top`` that the documentation has, of a real cluster with the packaged model.

    python scripts/picture_top.py [--into FOLDER] [--state STATE] [--size WIDTHxHEIGHT]

Needs Playwright and Chromium, as ``make test-browser`` does. ``--state`` takes the picture of another state of the
cluster than that of the documentation; their names are those of ``scripts/picture_page.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from embferry.cli.activity.routers import Router
from embferry.cli.top.app import TopApp
from picture_page import ARGUMENTS, CHROMIUM, ROOT, STATES, cluster, wait_until

DOCUMENTED = "resumes"
SIZE = (150, 40)
SECONDS = 3.0
"""Time for which the screen is watched before it is taken."""


async def screen(url: str, size: tuple[int, int]) -> str:
    """Returns the screen as SVG."""
    app = TopApp([Router(url)])
    async with app.run_test(size=size) as pilot:
        await asyncio.sleep(SECONDS)
        await pilot.pause()
        return app.export_screenshot(title=f"embferry top --url {url}")


def png(svg: str) -> bytes:
    """Returns an SVG as PNG. Chromium loads nothing for it: the font is one of this machine."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        page = browser.new_page(viewport={"width": 1900, "height": 1400})
        page.route("**/*", lambda route: route.abort())
        page.set_content(f"<body style='margin: 0; background: #fff'>{svg}</body>")
        taken = page.locator("svg").first.screenshot()
        browser.close()
    return bytes(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    parser.add_argument("--state", choices=STATES, default=DOCUMENTED)
    parser.add_argument("--size", default="x".join(map(str, SIZE)))
    chosen = parser.parse_args()
    width, _, height = chosen.size.partition("x")
    chosen.into.mkdir(parents=True, exist_ok=True)
    transfer, play = STATES[chosen.state]
    taken: list[str] = []
    with cluster(**transfer) as running:

        def take(condition: Callable[[], bool] = lambda: True) -> None:
            wait_until(condition)
            taken.append(asyncio.run(screen(running.url, (int(width), int(height)))))

        play(running, take)
    name = "top" if chosen.state == DOCUMENTED else f"top-{chosen.state}"
    path = chosen.into / f"{name}.png"
    picture = Image.open(io.BytesIO(png(taken[0]))).convert("RGB")
    picture.quantize(64, kmeans=1).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
