"""Takes the pictures of the live page that the documentation has, of a real cluster with the packaged model.

    python scripts/picture_page.py [--into FOLDER] [--all]

Needs Playwright and Chromium, as ``make test-browser`` does. ``--all`` takes every state in light and dark, wide and
narrow; without it, only those of the documentation are taken.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from embferry.serve.config import (
    BootstrapSettings,
    EncodeSettings,
    LanguageSettings,
    RouterSettings,
    ServeSettings,
    Settings,
    TransferSettings,
)
from embferry.serve.supervisor import LocalCluster

ROOT = Path(__file__).resolve().parent.parent
MEDIA = ROOT / "examples" / "media"
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


class Shot(NamedTuple):
    """One picture: its name, the size of the window, and the colour scheme."""

    name: str
    size: dict[str, int]
    scheme: str


DOCUMENTED = {"resumes": [Shot("page-wide", WIDE, "light"), Shot("page-narrow", NARROW, "dark")]}
"""State → its pictures in the documentation."""


@contextlib.contextmanager
def cluster(**transfer: Any) -> Iterator[LocalCluster]:
    """Yields a running cluster of two encode and two language workers."""
    settings = Settings(
        router=RouterSettings(port=0),
        bootstrap=BootstrapSettings(port=0),
        encode=EncodeSettings(port=0),
        language=LanguageSettings(port=0),
        serve=ServeSettings(encode_workers=2, language_workers=2),
        transfer=TransferSettings(**transfer),
    )
    with LocalCluster(settings) as running:
        running.wait_ready()
        yield running


class Clients:
    """Clients that ask about a picture again and again, each with other words so that every answer takes a while."""

    def __init__(self, url: str, count: int, tokens: int = 120, media: str = "garden.png") -> None:
        self._ending = threading.Event()
        self._url, self._tokens = url, tokens
        picture = base64.b64encode((MEDIA / media).read_bytes()).decode()
        self._picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        turn = 0
        while not self._ending.is_set():
            turn += 1
            text = {"type": "text", "text": f"what colour is the square? {number}-{turn}"}
            body = {"messages": [{"role": "user", "content": [self._picture, text]}], "stream": True}
            body |= {"max_tokens": self._tokens, "ignore_eos": True}
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=120, trust_env=False)


@contextlib.contextmanager
def opened(browser: Browser, url: str, shots: list[Shot]) -> Iterator[list[tuple[Shot, Page]]]:
    """Yields a live page for each picture."""
    contexts = [browser.new_context(viewport=shot.size, color_scheme=shot.scheme) for shot in shots]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(url)
        page.wait_for_selector('#state[data-is="live"]')
    yield list(zip(shots, pages, strict=True))
    for context in contexts:
        context.close()


def take(
    into: Path, pages: list[tuple[Shot, Page]], condition: Callable[[], bool] = lambda: True, *, whole: bool
) -> None:
    """Takes the pictures, each when the condition holds; in few colours so that they are small."""
    for shot, page in pages:
        wait_until(condition)
        path = into / f"{shot.name}.png"
        picture = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
        picture.quantize(256, kmeans=1).save(path, optimize=True)
        print(path)


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something worth a picture, for a minute at most."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)


def told(running: LocalCluster) -> dict[str, Any]:
    return dict(httpx.get(f"{running.url}/activity", timeout=30, trust_env=False).json())


def idle(running: LocalCluster, pages: Callable[[], None]) -> None:
    time.sleep(2)
    pages()


def busy(running: LocalCluster, pages: Callable[[], None]) -> None:
    with Clients(running.url, 30):
        wait_until(lambda: told(running)["under_way"] == 30)
        time.sleep(5)
        pages()


def resumes(running: LocalCluster, pages: Callable[..., None]) -> None:
    with Clients(running.url, 14, tokens=40):
        time.sleep(20)  # until the processes that decode have started, and the first answers are there

        def is_mixed() -> bool:
            phases = [one["phases"][-1][0] for one in told(running)["requests"] if one["ended"] is None]
            return phases.count("transfer") >= 3 and phases.count("decode") >= 3

        pages(is_mixed)


def killed(running: LocalCluster, pages: Callable[[], None]) -> None:
    with Clients(running.url, 8, tokens=30):
        time.sleep(5)
        encoder = next(worker for worker in running.workers if worker.name.startswith("encode"))
        os.kill(encoder.pid, signal.SIGKILL)
        time.sleep(4)
        pages()


STATES: dict[str, tuple[dict[str, Any], Callable[[LocalCluster, Callable[..., None]], None]]] = {
    "idle": ({}, idle),
    "busy": ({}, busy),
    "resumes": ({"num_blocks": 4, "block_size": 2}, resumes),
    "killed": ({}, killed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--state", choices=STATES)
    chosen = parser.parse_args()
    chosen.into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        for state, (transfer, play) in STATES.items():
            if chosen.state not in (None, state):
                continue
            shots = DOCUMENTED.get(state, [])
            if chosen.all:
                sizes = (("wide", WIDE), ("narrow", NARROW))
                shots = [Shot(f"{state}-{n}-{sch}", s, sch) for n, s in sizes for sch in ("light", "dark")]
            if not shots:
                continue
            with cluster(**transfer) as running, opened(browser, running.url, shots) as pages:
                play(running, functools.partial(take, chosen.into, pages, whole=chosen.all))
        browser.close()


if __name__ == "__main__":
    main()
