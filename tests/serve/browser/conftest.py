"""A real browser on the page of a real router before fake workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serve.fakes import Deployment

MILLISECONDS = 60_000
"""After which a condition that has not come true fails the test."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from picture_page import ARGUMENTS, CHROMIUM  # only the environment of this set has what it imports

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, deployment: Deployment) -> Iterator[Callable[..., Any]]:
    """Opens the page as ``visit(**options of the context)``.

    At the end no page has written an error to its console, and none has asked another server. Statuses that tests cause
    are not errors of the page.
    """
    contexts, troubles = [], []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        context.set_default_timeout(MILLISECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"an exception: {error}"))
        page.on("console", lambda line: troubles.append(line.text) if is_trouble(line) else None)
        page.on(
            "request", lambda asked: troubles.append(asked.url) if not asked.url.startswith(deployment.url) else None
        )
        page.goto(deployment.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def is_trouble(line: Any) -> bool:
    return line.type in ("error", "warning") and "Failed to load resource" not in line.text
