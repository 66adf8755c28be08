"""The screen shows what a router tells at ``/activity``, at any size, and of several routers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from rich.cells import cell_len

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, BREAK, HOLD, Deployment
from tests.serve.top.screen import Screen, watching

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}
PROGRESS = {"type": "progress", "tokens": 16, "total_tokens": 64, "transfers": 3, "bytes": 4096, "transport": "shm"}
LAST = {**PROGRESS, "tokens": 64, "transfers": 8, "seconds": 0.2, "ago": 0.0}
SIZES = [(60, 24), (80, 24), pytest.param((120, 40), marks=pytest.mark.sweeps), (200, 50)]


@pytest.fixture
def ready(deployment: Deployment) -> Deployment:
    deployment.wait(lambda: deployment.get("/ready").status_code == 200)
    return deployment


@pytest.fixture
def other() -> Iterator[Deployment]:
    """A second router, which ends when the event loop of the test has closed its connections."""
    with Deployment() as running:
        running.wait(lambda: running.get("/ready").status_code == 200)
        yield running


def ask(deployment: Deployment, **more: Any) -> int:
    body = {"messages": user(PICTURE, "?"), **more}
    return httpx.post(f"{deployment.url}{CHAT}", json=body, timeout=60).status_code


@contextmanager
def under_way(deployment: Deployment, count: int) -> Iterator[None]:
    """Keeps so many requests in the middle of their transfers."""
    deployment.fakes["language0"].scripts = [[PROGRESS, HOLD, LAST, *ANSWER] for _ in range(count)]
    asking = [threading.Thread(target=ask, args=(deployment,)) for _ in range(count)]
    for thread in asking:
        thread.start()
    try:
        deployment.wait(lambda: phases(deployment) == ["transfer"] * count)
        yield
    finally:
        deployment.release.set()
        for thread in asking:
            thread.join()


def told(deployment: Deployment) -> dict[str, Any]:
    return dict(deployment.get("/activity").json())


def phases(deployment: Deployment) -> list[str]:
    return [one["phases"][-1][0] for one in told(deployment)["requests"] if one["ended"] is None]


def misfits(screen: Screen) -> list[str]:
    """Returns the parts that are not drawn as they are, or beyond their width, or of which nothing is seen."""

    def fits(name: str) -> bool:
        seen, known, panel = screen.seen(name), screen.all(name), screen.panel(name)
        drawn = [*known, *[""] * len(seen)][panel.scroll_offset.y :][: len(seen)]
        return bool(seen and seen[0]) and seen == drawn and max(map(cell_len, known)) <= panel.columns

    found = [name for name in ("routers", "fleet", "requests", "times") if not fits(name)]
    last, size = screen.panel("requests").region, screen.app.size
    if not (last.height >= 4 and last.right <= size.width and last.bottom <= size.height):
        found.append(f"requests at {last} of {size}")
    return found


async def fits(screen: Screen) -> None:
    """Waits until every part is drawn as it is. Lines are made again when a part has got another width, a bit later."""
    try:
        await screen.until(lambda: not misfits(screen))
    except AssertionError:
        raise AssertionError(misfits(screen)) from None


@pytest.mark.parametrize("size", SIZES)
async def test_an_idle_router(ready: Deployment, size: tuple[int, int]) -> None:
    async with watching(ready.url, size=size) as screen:
        await screen.shows("routers", "● ready", ready.url)
        await screen.shows("fleet", "● encode 0", "0 requests")
        await screen.shows("fleet", "● language 0", "1 of 4 blocks")
        await screen.shows("requests", "No request yet.")
        await screen.shows("times", "first token", "none yet")
        await fits(screen)


@pytest.mark.parametrize("size", SIZES)
async def test_requests_under_way_are_those_of_activity(ready: Deployment, size: tuple[int, int]) -> None:
    with under_way(ready, 30):
        known = told(ready)
        async with watching(ready.url, size=size) as screen:
            await screen.until(lambda: len(screen.all("requests")) == 30)
            numbers = [line.split("#")[1].split()[0] for line in screen.all("requests")]
            assert sorted(map(int, numbers)) == sorted(known["running"])
            assert numbers == [str(n) for n in known["running"]]
            state = "transfer 25 % · 2 resumes" if size[0] >= 200 else "transfer 25 % ↻2"
            await screen.until(lambda: all("t ↻2" in line and state in line for line in screen.all("requests")))
            await screen.shows("routers", "30 under way")
            await screen.shows("fleet", "encode 0", "30 requests")
            await screen.shows("fleet", "language 0", "30 requests: 30 transfer")
            resumes = sum(event["count"] for event in known["events"] if event["kind"] == "resumed")
            if size[0] >= 80:
                await screen.shows("routers", f"{resumes} resumes in 5 min")
            assert len([line for line in screen.panel("events").lines if "2 resumes #" in line]) == 30
            await fits(screen)


async def test_requests_that_end_and_what_went_wrong(ready: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embferry.serve.router.fleet.SUSPECT_SECONDS", 1000.0)
    ready.workers.append(ready.entry("language1"))
    ready.wait(lambda: ready.get("/ready").json()["workers"]["language"] == 2)
    async with watching(ready.url, size=(160, 40)) as screen:
        await screen.shows("fleet", "● language 1")
        with under_way(ready, 1):
            await screen.shows("requests", "transfer 25 % · 2 resumes")
        await screen.shows("requests", "answered · 7 resumes")
        await screen.shows("events", "7 resumes #1 – the pool of language 0")
        await screen.shows("times", "transfer  mean 200 ms, most 200 ms")
        for name in ("language0", "language1"):  # one of them is next
            ready.fakes[name].script = ANSWER
        ready.fakes["language1"].scripts = [[BREAK]]
        assert ask(ready) == 200
        assert ask(ready, max_tokens=-1) == 400
        await screen.shows("events", "a call failed")
        await screen.shows("events", "second attempt #2")
        await screen.shows("events", "invalid_request #3 – the client was told")
        await screen.shows("requests", "#2", "answered ↻7 ×2")
        await screen.shows("requests", "#3", "invalid_request")
        await screen.shows("routers", "● degraded")
        await screen.shows("routers", "it has failed lately and is asked last")
        ready.workers = [ready.entry("language0")]
        await screen.shows("events", "worker lost – encode encode0")
        await screen.shows("routers", "● not ready")
        await screen.shows("routers", "no encode worker has a live lease")
        known = told(ready)
        await screen.until(lambda: len(screen.panel("events").lines) == len(known["events"]))
        await screen.until(lambda: len(screen.all("requests")) == len(known["requests"]) == 3)


async def test_two_routers(ready: Deployment, other: Deployment) -> None:
    ask(other)
    with under_way(ready, 2):
        async with watching(ready.url, other.url) as screen:
            await screen.shows("routers", "a ● ready", ready.url)
            await screen.shows("routers", "b ● ready", other.url)
            await screen.until(lambda: len(screen.all("requests")) == 3)
            names = [line[2:].split()[0] for line in screen.all("requests")]
            assert (sorted(names[:2]), names[2]) == (["a#1", "a#2"], "b#1")
            fleet = screen.all("fleet")
            assert (fleet[0], fleet[3]) == (f"a {ready.url}", f"b {other.url}")
            await screen.shows("fleet", "2 requests: 2 transfer")
            await screen.shows("events", "resumes a#1")
            await screen.shows("events", "resumes b#1")
            await fits(screen)


async def test_another_size_is_drawn_at_once(ready: Deployment) -> None:
    with under_way(ready, 30):
        async with watching(ready.url, size=(200, 50)) as screen:
            await screen.until(lambda: len(screen.all("requests")) == 30)
            beside = screen.panel("times").region
            assert beside.x > screen.panel("requests").region.right - 1
            for size in ((60, 24), (40, 12), (200, 50)):
                await screen.resize(*size)
                await screen.until(
                    lambda: cell_len(screen.panel("requests").lines[0]) == screen.panel("requests").columns
                )
                if size != (40, 12):
                    await fits(screen)
            assert screen.panel("times").region == beside
