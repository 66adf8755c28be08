"""Strangers, flipped bits and frozen processes between the router and real instances of ``vllm serve``."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from embferry.serve.http.proofs import OPEN_PATHS
from embferry.testing.proxy import ChaosProxy
from embferry.testing.stream_faults import Fault, Toward
from embferry.trust.keys import Key
from tests.ports import free_port
from tests.serve.relay.table import NAMED, TRIES
from tests.serve.vllm.servers import API_KEY, CONDITION_S, EMBFERRY, Proved, Servers, picture, until
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

NAMES = {"encode": "encode-0", "language": "language-0"}
FLIPS = 12
"""In each direction between the router and each instance."""


@pytest.mark.parametrize("name", NAMES.values())
def test_strangers_get_nothing_from_any_path_of_an_instance(servers: Servers, name: str) -> None:
    url = servers.at(name)
    with httpx.Client(auth=Proved(url), trust_env=False, timeout=CONDITION_S) as part:
        paths = part.get(f"{url}/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert "/invocations" in paths  # vLLM's own --api-key leaves it open
    before = servers.encoded_by(name), servers.computed_by(name)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    with httpx.Client(base_url=url, trust_env=False, timeout=CONDITION_S) as stranger:
        for path, methods in paths.items():
            for method in methods if path not in OPEN_PATHS else ():
                for headers in ({}, {"Authorization": f"Bearer {API_KEY}"}):
                    answer = stranger.request(method, path, json=body, headers=headers)
                    assert (method, path, answer.status_code) == (method, path, 401)
                    assert answer.json()["error"]["code"] == "proof_required"
        with pytest.raises(httpx.RemoteProtocolError, match="another cluster key"):
            stranger.post("/v1/chat/completions", json=body, auth=Proved(url, Key.new()))
    assert (servers.encoded_by(name), servers.computed_by(name)) == before


class Relayed:
    """A second router, which reaches the instances through relays. It has every picture encoded."""

    def __init__(self, servers: Servers, relays: dict[str, ChaosProxy], url: str) -> None:
        self.servers, self.relays, self.url = servers, relays, url
        self.content = [picture(500), text()]
        self.expected = servers.tokens(servers.undivided, *self.content)
        assert self.ask() == ""
        before = {role: self._counts(role) for role in relays}
        assert self.ask() == ""
        self.carried = {
            (role, toward): after[at] - old[at]
            for role, old in before.items()
            for after in [self._counts(role)]
            for at, toward in enumerate(("upstream", "clients"))
        }

    def ask(self, *, stream: bool = False) -> str:
        """Returns the error's code and text, "wrong: …", or nothing: the answer is right, token by token."""
        import openai

        try:
            found = self.servers.tokens(self.url, *self.content, stream=stream)
        except openai.APIError as error:
            return f"{error.code}: {error}"
        return "" if found == self.expected else f"wrong: {found}"

    def _counts(self, role: str) -> tuple[int, int]:
        relay = self.relays[role]
        return sum(relay.to_upstream), sum(relay.to_clients)


@pytest.fixture(scope="module")
def relayed(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relayed]:
    ports = {role: urlsplit(servers.at(name)).port or 0 for role, name in NAMES.items()}
    with ChaosProxy(ports["encode"]) as encode, ChaosProxy(ports["language"]) as language:
        url = f"http://127.0.0.1:{(port := free_port())}"
        relays = dict(zip(NAMES, (encode, language), strict=True))
        urls = [f"--{role}-urls=http://127.0.0.1:{relay.port}" for role, relay in relays.items()]
        # It probes seldom, so that a fault strikes a request.
        options = ("--received-bytes", "0", "--poll-interval", "60", "--request-timeout", "60", "--port", str(port))
        log = tmp_path_factory.mktemp("relayed") / "log"
        router = servers.start(log, *EMBFERRY, "router", "--engine", "vllm", *urls, *options)
        try:
            servers.wait("the router", f"{url}/ready")
            yield Relayed(servers, relays, url)
        finally:
            router.send_signal(signal.SIGINT)
            assert router.wait(CONDITION_S) == 0


@pytest.mark.parametrize("toward", ["upstream", "clients"])
@pytest.mark.parametrize("role", NAMES)
def test_a_flipped_bit_gives_the_right_answer_or_an_error(relayed: Relayed, role: str, toward: Toward) -> None:
    draw, relay, carried = random.Random(f"{role} {toward}"), relayed.relays[role], relayed.carried[role, toward]
    outcomes = []
    for number in range(FLIPS):
        at, bit = draw.randrange(carried), draw.randrange(8)
        relay.arm(Fault("flip", toward, at=at, bit=bit))
        outcome = ""
        for _ in range(TRIES):
            outcome = relayed.ask(stream=bool(number % 2))
            if relay.struck.is_set() or outcome:
                break
        assert relay.struck.is_set(), (at, bit, carried, outcome)
        relay.disarm()
        outcomes.append((at, bit, outcome))
        until(lambda: relayed.ask() == "", outcomes)
    assert [one for one in outcomes if one[2] and one[2].partition(":")[0] not in NAMED] == []


def test_a_frozen_encoder_is_passed_over(servers: Servers) -> None:
    contents = [[picture(600 + number), text()] for number in range(12)]
    before = servers.counted("encode_retries_total")
    with servers.held("encode-0"), ThreadPoolExecutor(len(contents)) as pool:
        found = list(pool.map(lambda content: servers.tokens(servers.url, *content), contents))
    assert found == [servers.tokens(servers.undivided, *content) for content in contents]
    assert servers.counted("encode_retries_total") > before
    until(lambda: servers.counted('workers{role="encode"}') == 2)


def test_a_frozen_language_instance_is_an_error_and_no_wait(servers: Servers) -> None:
    import openai

    content: list[Any] = [picture(620), text()]
    servers.tokens(servers.url, *content)
    with servers.held("language-0"), pytest.raises(openai.InternalServerError, match=r"router\.stall_timeout"):
        servers.tokens(servers.url, *content)
    until(lambda: servers.counted('workers{role="language"}') == 1)
    assert servers.tokens(servers.url, *content) == servers.tokens(servers.undivided, *content)
