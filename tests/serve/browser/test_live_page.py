"""The live page in a browser: what it shows of requests, workers and failures, and that it can be used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, BREAK, DEADLINE, HOLD, Deployment, tokens

pytestmark = pytest.mark.browser

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}
PROGRESS = {"type": "progress", "tokens": 16, "total_tokens": 64, "transfers": 3, "bytes": 4096, "transport": "shm"}
LAST = {**PROGRESS, "tokens": 64, "transfers": 8, "seconds": 0.2, "ago": 0.0}
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
Visit = Callable[..., Any]


def live(page: Any) -> Any:
    page.wait_for_selector('#state[data-is="live"]')
    holds(page, "document.querySelectorAll('#picture .name').length === 3")  # the router and two workers
    return page


def holds(page: Any, condition: str) -> None:
    """Waits for an expression of JavaScript, which the page itself may not evaluate: its policy forbids that."""
    for _ in range(int(DEADLINE / 0.02)):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{condition} did not come true")


def ask(deployment: Deployment, **more: Any) -> httpx.Response:
    body = {"messages": user(PICTURE, "?"), **more}
    return httpx.post(f"{deployment.url}{CHAT}", json=body, timeout=DEADLINE, trust_env=False)


@contextmanager
def under_way(deployment: Deployment, script: list[Any]) -> Iterator[None]:
    """Keeps a request where its worker's script holds; at the end it goes on."""
    deployment.fakes["language0"].scripts.append(script)
    asking = threading.Thread(target=ask, args=(deployment,))
    asking.start()
    try:
        yield
    finally:
        deployment.release.set()
        asking.join()


def text(page: Any, selector: str) -> str:
    return " ".join(page.locator(selector).inner_text().split())


def shows(page: Any, selector: str, words: str) -> None:
    page.locator(selector).filter(has_text=words).first.wait_for()


def test_an_idle_page_says_what_to_do_next(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())
    command = page.locator("#command").inner_text()
    assert command.startswith(f"curl -sS {deployment.url}/v1/chat/completions ")
    assert '"model":"shapes"' in command
    assert page.locator("#rows li").count() == 0
    assert text(page, "#figures li:first-child") == "0 under way 0 requests ended"
    assert page.locator("#picture").get_attribute("aria-label") == (
        "Encoders: 1 of 1 up. Language workers: 1 of 1 up. 0 transfers under way."
    )


def test_a_router_without_workers_says_what_is_missing(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())
    deployment.workers = deployment.workers[:1]
    shows(page, "#missing", "no language worker has a live lease")
    shows(page, "#log li", "worker lost")
    assert page.locator("#no-request").is_hidden()


def test_a_request_is_shown_from_its_transfer_to_its_end(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())
    with under_way(deployment, [PROGRESS, HOLD, LAST, *ANSWER]):
        shows(page, ".outcome", "transfer · 2 resumes")
        shows(page, "#figures li:first-child", "1")
        page.wait_for_selector("#picture .ferry")
        shows(page, "#picture .ferry-text", "↻2")
        before = page.locator(".row .bar i.transfer").evaluate("(bar) => bar.style.width")
        holds(page, f"document.querySelector('.row .bar i.transfer').style.width !== '{before}'")
        shows(page, "#log li", "2 resumes")
    shows(page, ".outcome", "answered · 7 resumes")
    shows(page, "#log li", "7 resumes")
    names = page.locator(".row .bar i").evaluate_all("all => all.map((one) => one.className)")
    assert names == ["fetch", "encode", "transfer", "prefill", "decode"]
    shows(page, "#figures li", "7 resumed transfers")
    assert text(page, "#transfer-now").startswith("mean 200 ms")
    holds(page, "!document.querySelector('#picture .ferry')")


def test_a_row_opens_its_timeline_by_click_and_by_key(visit: Visit, deployment: Deployment) -> None:
    deployment.fakes["language0"].script = [PROGRESS, LAST, *ANSWER]
    page = live(visit())
    assert ask(deployment).status_code == 200
    shows(page, ".outcome", "answered")
    row = page.locator(".row")
    row.click()
    told = text(page, ".timeline")
    for words in (
        "encode 0 (encode0)",
        "language 0 (language0)",
        "64 of 64 tokens",
        "1 initial and 7 resumed transfers",
        "over shm",
        "number=1",
    ):
        assert words in told
    assert row.get_attribute("aria-expanded") == "true"
    row.press("Enter")
    assert page.locator(".timeline").is_hidden()
    row.press("Space")
    assert page.locator(".timeline").is_visible()


def test_failures_are_shown_as_they_happen(
    visit: Visit, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embferry.serve.router.fleet.SUSPECT_SECONDS", 1000.0)
    deployment.workers.append(deployment.entry("language1"))
    deployment.fakes["language0"].scripts = [[BREAK]]
    page = visit()
    holds(page, "document.querySelectorAll('#picture .name').length === 4")
    assert ask(deployment).status_code == 200
    shows(page, "#log li", "a call failed")
    shows(page, "#log li", "second attempt #1 – After worker_failed at language 0.")
    shows(page, ".outcome", "answered · 7 resumes · 2 attempts")
    assert ask(deployment, max_tokens=-1).status_code == 400
    shows(page, ".outcome.failed", "invalid_request")
    shows(page, "#log .bad", "invalid_request")
    page.wait_for_selector("#picture .card.late")


def test_many_requests_at_once(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())
    deployment.fakes["language0"].scripts = [[PROGRESS, HOLD, LAST, *ANSWER] for _ in range(30)]
    asking = [threading.Thread(target=ask, args=(deployment,)) for _ in range(30)]
    for thread in asking:
        thread.start()
    holds(page, "document.querySelectorAll('.outcome.running').length === 30")
    shows(page, "#figures li:first-child", "30")
    holds(page, "document.querySelectorAll('#picture .ferry').length === 30")
    deployment.release.set()
    for thread in asking:
        thread.join()
    holds(page, "document.querySelectorAll('.outcome.running').length === 0")
    shows(page, "#figures li:first-child", "30 requests ended")


@pytest.mark.parametrize("deployment", [{"api_key": "sesame-7"}], indirect=True)
def test_the_page_asks_for_the_api_key_and_keeps_it_in_its_tab(visit: Visit, deployment: Deployment) -> None:
    page = visit()
    page.wait_for_selector("#key:not([hidden])")
    assert page.locator("main").is_hidden()
    page.fill("#key-text", "wrong")
    page.click("#key button")
    shows(page, "#key-trouble", "not accepted")
    page.fill("#key-text", "sesame-7")
    page.press("#key-text", "Enter")
    live(page)
    assert page.locator("#key").is_hidden()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert "sesame-7" not in page.url
    page.reload()
    live(page)
    assert "sesame-7" not in page.content()
    another = page.context.new_page()
    another.goto(deployment.url)
    another.wait_for_selector("#key:not([hidden])")


LUMINANCE = """
() => {
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a] = numbers(getComputedStyle(at).backgroundColor);
      if (a !== 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const says = (one) => one.nodeType === Node.TEXT_NODE && one.data.trim();
  const seen = (element) => element.getClientRects().length && [...element.childNodes].some(says);
  return [...document.querySelectorAll("body *")].filter(seen).map((element) => {
    const inPicture = element.closest("svg");
    const card = inPicture && element.parentElement.querySelector("rect");
    const text = light(numbers(getComputedStyle(element)[inPicture ? "fill" : "color"]));
    const back = light(card ? numbers(getComputedStyle(card).fill) : behind(element));
    return [(Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05), element.textContent.trim().slice(0, 40)];
  }).filter(([contrast]) => contrast < 4.5);
}
"""
"""Returns the texts whose contrast is less than WCAG's AA asks for."""


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_and_nothing_is_wider_than_the_window(
    visit: Visit, deployment: Deployment, size: dict[str, int], scheme: str
) -> None:
    page = live(visit(viewport=size, color_scheme=scheme, has_touch=size is PHONE))
    assert ask(deployment, max_tokens=-1).status_code == 400
    with under_way(deployment, [PROGRESS, HOLD, LAST, *ANSWER]):
        shows(page, ".outcome", "transfer")
        page.locator(".row").first.click()
        assert page.evaluate(LUMINANCE) == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        inside = "(box) => box.left >= 0 && box.right <= window.innerWidth + 1"
        assert page.evaluate(
            "[...document.querySelectorAll('#picture text, #picture rect')]"
            f".every((one) => ({inside})(one.getBoundingClientRect()))"
        )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != (
        "rgb(243, 245, 248)" if scheme == "dark" else "rgb(13, 19, 25)"
    )


def test_without_motion_dots_stand_where_the_embedding_is(visit: Visit, deployment: Deployment) -> None:
    page = live(visit(reduced_motion="reduce"))
    with under_way(deployment, [PROGRESS, HOLD, LAST, *ANSWER]):
        shows(page, ".outcome", "transfer")
        page.wait_for_selector("#picture .ferry")
        spot = "() => document.querySelector('#picture .ferry').getAttribute('cx')"
        first = page.evaluate(spot)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate(spot) == first
    shows(page, ".outcome", "answered")


def test_the_page_says_that_the_router_is_gone(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())
    page.context.set_offline(True)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as when the tab is looked at again
    shows(page, '#state[data-is="waiting"]', "the router is gone; trying again")
    assert page.locator("#picture .name").count() == 3
    page.context.set_offline(False)
    live(page)


def test_a_page_that_is_closed_watches_no_more(visit: Visit, deployment: Deployment) -> None:
    page = live(visit())

    def watching() -> float:
        lines = httpx.get(f"{deployment.url}/metrics", trust_env=False).text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith("embferry_router_client_in_flight{")))

    assert watching() == 1
    page.close()
    deployment.wait(lambda: watching() == 0)


def test_an_answer_shows_nothing_that_was_asked_or_said(visit: Visit, deployment: Deployment) -> None:
    deployment.fakes["language0"].script = [*tokens("hunter2"), *ANSWER]
    page = live(visit())
    assert ask(deployment, user="hunter2").status_code == 200
    shows(page, ".outcome", "answered")
    page.locator(".row").click()
    assert "hunter2" not in page.content()
