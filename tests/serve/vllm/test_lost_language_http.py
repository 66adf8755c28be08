"""A language instance of ``vllm serve`` that is killed: the other one takes what the encoder still offers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.serve.vllm.instance_proofs import AUTHORIZATION
from tests.serve.vllm.servers import (
    API_KEY,
    CONDITION_S,
    EMBFERRY,
    ENCODERS,
    VLLM,
    Servers,
    picture,
    until,
)
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

LANGUAGES = ("language-0", "language-1")


class TwoLanguages(Servers):
    """Two encoders, two language instances and a router. No undivided server: a language instance is one, too."""

    def __init__(self, folder: Path) -> None:
        self._prepare(folder, {})
        self.undivided = ""
        words = ("serve", "--engine", "vllm", "--model", str(folder / "model"), "--port", "0", "--restart-delay", "0.1")
        instances = ("--encoders", str(ENCODERS), "--languages", str(len(LANGUAGES)))
        patient = ("--stall-timeout", str(CONDITION_S))  # while tests suspend an instance
        self.split = self.start(self._log, *EMBFERRY, *words, *instances, *patient, "--", *VLLM)

    def undivided_tokens(self, name: str, *content: Any) -> list[int]:
        """Returns the tokens of a language instance that is asked past the router: it encodes the pictures itself."""
        self.undivided = self.at(name)
        return self.tokens(self.undivided, *content)

    def client(self, url: str) -> Any:
        client = super().client(url)
        if url != self.undivided:
            return client
        return client.with_options(default_headers={AUTHORIZATION: f"Bearer {API_KEY}"})  # vLLM's own key

    def busy(self) -> list[str]:
        """Returns the language instances that have a request of the router."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        known = httpx.get(f"{self.url}/workers", headers=headers, trust_env=False, timeout=CONDITION_S).json()
        urls = [one["url"] for one in known["workers"] if one["role"] == "language" and one["in_flight"]]
        return [name for name in LANGUAGES if self.at(name) in urls]

    def encoder_runs(self) -> float:
        """Returns how many embeddings the encoders have made."""
        names = [f"encode-{number}" for number in range(ENCODERS)]
        return sum(self.metric(name, "embferry_connector_items_encoded_total") for name in names)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoLanguages]:
    started = TwoLanguages(tmp_path_factory.mktemp("two"))
    try:
        started.wait("ready:")
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_language_instance_costs_no_encode(two: TwoLanguages, stream: bool) -> None:
    """It is killed when it has the request and the embedding is encoded. Its place is taken within the request."""
    content = [picture(1 + stream, 896, 896), text()]
    until(lambda: two.counted('workers{role="language"}') == len(LANGUAGES))
    encodes, runs = two.counted("encodes_total"), two.encoder_runs()
    attempts = two.counted("chat_second_attempts_total")
    with ThreadPoolExecutor(1) as pool:
        with two.held(LANGUAGES[0]), two.held(LANGUAGES[1]):
            asked = pool.submit(two.tokens, two.url, *content, stream=stream)
            until(lambda: (two.counted("encodes_total") == encodes + 1 and two.busy()) or asked.done())
            (killed,) = two.busy()
            two.kill(killed)
        tokens = asked.result(CONDITION_S)
    (other,) = (name for name in LANGUAGES if name != killed)
    assert two.received_by(other) >= 1
    assert (two.counted("encodes_total"), two.encoder_runs()) == (encodes + 1, runs + 1)
    assert two.counted("chat_second_attempts_total") == attempts + 1
    assert two.counted("failovers_total") == 0
    assert tokens == two.undivided_tokens(other, *content)
