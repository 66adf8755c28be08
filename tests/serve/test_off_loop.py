"""Large bodies are parsed beside the event loop: a server answers other requests meanwhile."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import httpx
import pytest

from embferry.serve import off_loop as off_loop_module
from embferry.serve.media.fetch import Fetcher
from embferry.serve.off_loop import JSON_WEIGHT, LARGE_BYTES
from embferry.serve.router.chat import Chat
from tests.serve.blocking import LARGE, Blocking
from tests.serve.conftest import user
from tests.serve.fakes import DEADLINE, Deployment


@pytest.mark.integration
@pytest.mark.parametrize(
    ("owner", "size", "code"),
    [
        ((Chat, "_parsed"), LARGE, "media_too_large"),
        ((Chat, "_parsed"), LARGE_BYTES // JSON_WEIGHT, "unsupported_media_type"),
        ((Fetcher, "_inline"), LARGE, "media_too_large"),
    ],
    ids=["json", "small json of many values", "base64"],
)
def test_the_router_answers_while_it_parses(
    deployment: Deployment,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    owner: tuple[type, str],
    size: int,
    code: str,
) -> None:
    blocking = Blocking(getattr(*owner))
    monkeypatch.setattr(*owner, lambda *arguments: blocking(*arguments))
    url = "data:image/png;base64," + "A" * size
    body = {"model": "shapes", "messages": user({"type": "image_url", "image_url": {"url": url}}, "?")}
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(http.post("/v1/chat/completions", json=body)))
    asking.start()
    try:
        assert blocking.called.wait(DEADLINE)
        with httpx.Client(base_url=deployment.url, trust_env=False, timeout=DEADLINE) as other:
            assert other.get("/health").status_code == 200
        assert answers == []
    finally:
        blocking.release.set()
        asking.join(DEADLINE)
    assert answers[0].json()["error"]["code"] == code


@pytest.mark.asyncio
async def test_only_so_many_jobs_run_at_the_same_time() -> None:
    jobs = off_loop_module.JOBS + 1
    blocking = Blocking(lambda number: number)
    running, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return blocking(number)
        finally:
            with lock:
                running -= 1

    tasks = [asyncio.create_task(off_loop_module.off_loop(LARGE, work, number)) for number in range(jobs)]
    while running < off_loop_module.JOBS:
        await asyncio.sleep(0)
    blocking.release.set()
    assert await asyncio.gather(*tasks) == list(range(jobs))
    assert most == off_loop_module.JOBS


@pytest.mark.asyncio
async def test_small_work_stays_on_the_loop() -> None:
    assert await off_loop_module.off_loop(1, threading.current_thread) is threading.current_thread()
    assert await off_loop_module.off_loop(LARGE, threading.current_thread) is not threading.current_thread()
    assert await off_loop_module.off_loop(LARGE, base64.b64decode, "QUJD") == b"ABC"
