"""A router before fake workers, and clients of it, for tests over HTTP."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from embferry.observe import logs

if TYPE_CHECKING:
    from tests.serve.fakes import Deployment
    from tests.serve.inside import Inside

CLIENT_TIMEOUT = 100
"""Seconds a request may take; a guard against hangs."""


@pytest.fixture
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A running router. Other settings: ``@pytest.mark.parametrize("deployment", [{…}], indirect=True)``."""
    from tests.serve.fakes import Deployment  # needs av, which the environment of vLLM does not have

    with Deployment(**dict(getattr(request, "param", {}))) as running:
        yield running


@pytest.fixture
def inside(request: pytest.FixtureRequest) -> Iterator[Inside]:
    """A router in the process of the test. Other settings: as for :func:`deployment`."""
    from tests.serve.inside import Inside

    made = Inside(**dict(getattr(request, "param", {})))
    yield made
    made.close()


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0, timeout=CLIENT_TIMEOUT
    ) as client:
        yield client


@pytest.fixture
def http(deployment: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployment.url, verify=False, trust_env=False, timeout=CLIENT_TIMEOUT) as client:
        yield client


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the settings of the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith(("EMBFERRY_", "SGLANG_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores the root logger, which the commands configure."""
    monkeypatch.setattr(logs, "_process", logs._Process())
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def user(*parts: Any) -> list[dict[str, Any]]:
    """Returns the messages of a request: one user message of texts and other parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


@pytest.fixture
def site() -> Iterator[str]:
    """Runs the web site and returns its ``host:port``."""
    from tests.serve.web_site import running_site  # needs av, too

    with running_site() as at:
        yield at
