"""Real instances of ``vllm serve`` with prefix caching and the cache that encoders share: what is not encoded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.cache.folder import FolderStore
from tests.serve.vllm.servers import (
    API_KEY,
    CONDITION_S,
    EMBFERRY,
    GREEDY,
    MORE,
    VLLM,
    Servers,
    answers,
    picture,
    until,
)
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

LONG = text("what is there? " * 60)
"""A question longer than a block of vLLM's keys and values, so that the blocks before its end cover the picture."""


class CachingServers(Servers):
    """One encoder, one language instance and the router, which believes in no embedding that an instance keeps."""

    def __init__(self, folder: Path) -> None:
        self._prepare(folder, {})
        words = ("serve", "--engine", "vllm", "--model", str(folder / "model"), "--port", "0", "--restart-delay", "0.1")
        more = ("--cache", f"file://{folder}/cache", "--received-bytes", "1")
        vllm = [word for word in VLLM if word != "--no-enable-prefix-caching"]
        self.split = self.start(self._log, *EMBFERRY, *words, *more, "--", *vllm)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CachingServers]:
    folder = tmp_path_factory.mktemp("caching")
    running = CachingServers(folder)
    try:
        running.wait("ready:")
        yield running
    finally:
        running.close()


def ask(servers: Servers, *messages: dict[str, Any], **more: Any) -> tuple[str, list[int]]:
    """Returns text and tokens of an answer."""
    body = {"model": "tiny", "messages": messages, **GREEDY, **MORE, **more}
    response = httpx.post(
        f"{servers.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=CONDITION_S,
        trust_env=False,
    )
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"], choice["token_ids"]


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def counts(servers: Servers) -> tuple[float, float, float]:
    """Returns the encodes and those that were not necessary, and how often the instance needed what it still has."""
    reused = counted_by(servers, "language-0", r"embferry_connector_cache_hits_total[{ ]")
    return servers.counted("encodes_total"), servers.counted("encodes_skipped_total"), reused


@pytest.mark.parametrize(("question", "is_covered"), [(LONG, True), (text("what?"), False)])
def test_the_second_turn_costs_no_encode(servers: CachingServers, question: dict[str, Any], is_covered: bool) -> None:
    """If the prefix cache covers the picture, not even its embedding is needed."""
    encodes, skipped, reused = counts(servers)
    first = user(picture(1 + is_covered, 448, 448), question)
    said, _ = ask(servers, first)
    assert counts(servers) == (encodes + 1, skipped, reused)
    turns = [first, {"role": "assistant", "content": said}, user(text("and what colour?"))]
    _, tokens = ask(servers, *turns)
    assert counts(servers) == (encodes + 1, skipped + 1, reused + (not is_covered))
    _, encoded = ask(servers, *turns, cache_salt="another")  # the prefix cache holds nothing for it
    assert tokens == encoded


def test_a_picture_is_named_by_its_uuid_alone(servers: CachingServers) -> None:
    sent = {**picture(3, 448, 448), "uuid": "mine"}
    _, tokens = ask(servers, user(sent, text("what is there?")))
    for salt in ("one", "two"):  # from what the instance has, and from the router's file
        named = {"type": "image_url", "image_url": None, "uuid": "mine"}
        assert ask(servers, user(named, text("what is there?")), cache_salt=salt)[1] == tokens


def counted_by(servers: Servers, name: str, pattern: str) -> float:
    """Returns the sum of an instance's metrics that match."""
    metrics = httpx.get(f"{servers.at(name)}/metrics", trust_env=False, timeout=CONDITION_S).text
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if re.match(pattern, line))


def load(servers: Servers) -> float:
    """Returns how many requests the encoder is running, or has waiting."""
    return counted_by(servers, "encode-0", r"vllm:num_requests_(running|waiting)[{ ]")


def completed(servers: Servers) -> float:
    return counted_by(servers, "encode-0", r'vllm:request_success_total\{.*finished_reason="(stop|length)"')


def test_encodes_of_clients_that_leave_end_at_the_encoder(servers: CachingServers) -> None:
    """Some of the pictures wait at the encoder when their clients leave, so they are never encoded."""
    answered, number = completed(servers), 8

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=CONDITION_S, trust_env=False) as client:
            asked = [user(picture(100 + one, 1568, 1568), text("what is there?")) for one in range(number)]
            calls = [
                asyncio.create_task(
                    client.post(
                        f"{servers.url}/v1/chat/completions",
                        json={"model": "tiny", "messages": [one], **GREEDY},
                        headers={"Authorization": f"Bearer {API_KEY}"},
                    )
                )
                for one in asked
            ]
            async with asyncio.timeout(CONDITION_S):
                while await asyncio.to_thread(load, servers) < 2:
                    await asyncio.sleep(0.005)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: load(servers) == 0)
    assert completed(servers) - answered < number
    assert servers.counted("chat_aborted_total") >= number - 1


def test_after_a_restart_an_encoder_finds_what_it_had_encoded(servers: CachingServers) -> None:
    asked = user(picture(4, 448, 448), text("what is there?"))
    _, tokens = ask(servers, asked)
    store = FolderStore(servers._folder / "cache", 1 << 40)
    until(lambda: len(store.files()) >= 4)
    servers.kill("encode-0")
    until(lambda: servers.log.count("encode-0 answers at") == 2)
    until(lambda: answers(servers.at("encode-0") + "/health"))
    assert ask(servers, asked, cache_salt="another")[1] == tokens
    assert counted_by(servers, "encode-0", r"embferry_connector_shared_cache_hits_total[{ ]") == 1
    assert counted_by(servers, "encode-0", r"embferry_connector_items_encoded_total[{ ]") == 0
