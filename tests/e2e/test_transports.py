"""Real clusters on http, nixl and mooncake: the answers equal those of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from embferry.serve.config import BootstrapSettings, RouterSettings, Settings, TransferSettings
from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import Undivided, UndividedAnswer

from .conftest import BLOCK_SIZE, BLOCKS, MAX_TOKENS, REQUEST_TIMEOUT, START_TIMEOUT, Question, questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

TIMES = 2
ENGINES = [pytest.param(name, marks=pytest.mark.engines) for name in ("nixl", "mooncake")]


@pytest.fixture(scope="module", params=[pytest.param("http", marks=pytest.mark.sweeps), *ENGINES])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(router=RouterSettings(port=0, request_timeout=REQUEST_TIMEOUT), bootstrap=BootstrapSettings(port=0))


@pytest.fixture(scope="module")
def answered(settings: Settings) -> list[tuple[Question, UndividedAnswer]]:
    """The questions in ``examples/``, about pictures and a video, and the answers of one process."""
    undivided = Undivided(settings)
    shipped = [question for question in questions() if question.truth is not None]
    return [(question, undivided.answer(question.media, question.text, MAX_TOKENS)) for question in shipped]


@pytest.fixture(scope="module")
def cluster(
    transport: str, settings: Settings, answered: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    transfer = TransferSettings(transports=(transport,), num_blocks=BLOCKS, block_size=BLOCK_SIZE)
    logs = tmp_path_factory.mktemp("cluster") / "log"
    with LocalCluster(settings.model_copy(update={"transfer": transfer}), logs=logs) as running:
        running.wait_ready(START_TIMEOUT)
        yield running


def test_the_answers_equal_those_of_one_process(
    transport: str, cluster: LocalCluster, answered: list[tuple[Question, UndividedAnswer]]
) -> None:
    requests = answered * TIMES

    async def ask_all() -> list[Any]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=REQUEST_TIMEOUT, trust_env=False) as client:
            bodies = ({"model": "shapes", "messages": q.messages, "max_tokens": MAX_TOKENS} for q, _ in requests)
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    for response, (question, one) in zip(asyncio.run(ask_all()), requests, strict=True):
        assert response.status_code == 200, response.text
        extension = response.json()["embferry"]
        assert tuple(extension["tokens"]) == one.tokens, question.text
        assert extension["transfer"]["transport"] == transport
        assert extension["transfer"]["total_tokens"] == one.visual_tokens

    language = next(view for view in cluster.workers if view.role == "language")
    pool = httpx.get(f"{language.url}/debug/pool", timeout=REQUEST_TIMEOUT, trust_env=False).json()
    assert pool == {"num_blocks": BLOCKS, "available": BLOCKS, "used": 0, "quarantined": 0}
    metrics = httpx.get(f"{language.url}/metrics", timeout=REQUEST_TIMEOUT, trust_env=False).text
    assert f'embferry_language_transfer_bytes_total{{transport="{transport}"}}' in metrics
