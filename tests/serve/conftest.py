"""Fixtures: a router before fake workers, and HTTP clients for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.fakes import DEADLINE, Deployment


@pytest.fixture
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """For other settings: ``@pytest.mark.parametrize("deployment", [{…}], indirect=True)``."""
    with Deployment(**dict(getattr(request, "param", {}))) as running:
        yield running


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE) as client:
        yield client


@pytest.fixture
def http(deployment: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployment.url, verify=False, trust_env=False, timeout=DEADLINE) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("EMBFERRY_", "SGLANG_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restores the root logger: commands configure it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def user(*parts: Any) -> list[dict[str, Any]]:
    """Returns one user message of texts and other parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]
