"""Two hundred concurrent questions about pictures and videos, through a pool of eight blocks."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import openai
import pytest

from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import UndividedAnswer

from .conftest import BLOCK_SIZE, BLOCKS, MAX_TOKENS, REQUEST_TIMEOUT, Question

pytestmark = [
    pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(1500),
    pytest.mark.parametrize("cluster", ["tcp"], indirect=True, scope="session"),
]  # fmt: skip

REQUESTS = 200


def test_two_hundred_concurrent_answers_equal_those_of_one_process(
    cluster: LocalCluster, expected: list[tuple[Question, UndividedAnswer]]
) -> None:
    chosen = [expected[n % len(expected)] for n in range(REQUESTS)]
    random.Random(1).shuffle(chosen)

    async def ask_all() -> list[Any]:
        limits = httpx.Limits(max_connections=REQUESTS)
        http = httpx.AsyncClient(limits=limits, timeout=REQUEST_TIMEOUT, trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            asking = (
                client.chat.completions.create(model="shapes", messages=q.messages, max_tokens=MAX_TOKENS)
                for q, _ in chosen
            )
            return await asyncio.gather(*asking)

    answers = asyncio.run(ask_all())
    assert len(answers) == REQUESTS
    for answer, (question, one) in zip(answers, chosen, strict=True):
        assert tuple(answer.model_extra["embferry"]["tokens"]) == one.tokens, question.text
        assert answer.choices[0].message.content == one.text
        assert question.truth in (None, one.text), f"{question.text}: the undivided model is wrong"
        transfer = answer.model_extra["embferry"]["transfer"]
        assert transfer["total_tokens"] == one.visual_tokens
        assert transfer["initial"] == 1
        assert transfer["resumed"] >= one.visual_tokens // (BLOCKS * BLOCK_SIZE) - 1


def test_all_blocks_are_available_afterwards(cluster: LocalCluster) -> None:
    language = next(view for view in cluster.workers if view.role == "language")
    pool = httpx.get(f"{language.url}/debug/pool", timeout=REQUEST_TIMEOUT, trust_env=False).json()
    assert pool == {"num_blocks": BLOCKS, "available": BLOCKS, "used": 0, "quarantined": 0}
