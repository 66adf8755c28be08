"""A relay between a router and each worker flips bits: the answer is the right one, or an error.

Three real processes: an encode worker, a language worker, and a router that finds both behind relays.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.serve.config import RouterSettings
from embferry.serve.supervisor import LocalCluster
from embferry.testing.proxy import ChaosProxy
from embferry.testing.stream_faults import Fault
from tests.ports import free_port
from tests.serve.pictures import data_url, encoded, noise
from tests.serve.workers.test_processes import DEADLINE, SETTINGS, START, wait

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

PLACES, SEED = 50, 12
STALL = 2.0
"""Seconds; a worker gives a sign of life every second."""
ROUTER = "from embferry.cli.main import run; run()"
CONTENT = [
    {"type": "image_url", "image_url": {"url": data_url(encoded(noise(64, 64), "BMP"))}},
    {"type": "text", "text": "Which colours and which shapes are there, and how many of each of them?"},
]
QUESTION: dict[str, Any] = {
    "model": "shapes",
    "messages": [{"role": "user", "content": CONTENT}],
    "max_tokens": 24,
    "temperature": 1.5,  # the picture decides every token
    "seed": 3,
}


@dataclass
class Relayed:
    """A router and the relays between it and its workers, by role."""

    url: str
    relays: dict[str, ChaosProxy]

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=QUESTION, timeout=DEADLINE, trust_env=False)

    def tokens(self) -> list[int]:
        response = self.ask()
        assert response.status_code == 200, response.text
        return list(response.json()["embferry"]["tokens"])

    def bytes_of_an_answer(self, role: str, toward: Literal["clients", "upstream"]) -> int:
        """Returns how many bytes cross a relay for one question."""
        relay = self.relays[role]
        counts = relay.to_clients if toward == "clients" else relay.to_upstream
        before = sum(counts)
        self.tokens()
        return sum(counts) - before


@pytest.fixture(scope="module")
def relayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relayed]:
    folder = tmp_path_factory.mktemp("relayed")
    settings = SETTINGS.model_copy(update={"router": RouterSettings(port=0, body_timeout=STALL)})
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(settings, logs=folder / "log"))
        cluster.wait_ready(START)
        listed = stack.enter_context(BootstrapServer("127.0.0.1", 0, lease_seconds=3600))
        relays = {}
        for worker in BootstrapClient(cluster.bootstrap_url).workers():
            relay = stack.enter_context(ChaosProxy(int(worker.url.rpartition(":")[2])))
            behind = msgspec.structs.replace(worker, url=f"http://127.0.0.1:{relay.port}")
            BootstrapClient(listed.url).register(behind)
            relays[worker.role] = relay
        url = stack.enter_context(_Router(listed.url, folder / "router"))
        yield Relayed(url, relays)


class _Router:
    """A router process. A context manager, which yields its URL when it is ready."""

    def __init__(self, bootstrap: str, log: Path) -> None:
        self._port = free_port()
        options = {"port": self._port, "bootstrap-url": bootstrap, "stall-timeout": STALL, "poll-interval": 0.1}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with log.open("wb") as output:
            self._process = subprocess.Popen([sys.executable, "-c", ROUTER, "router", *words], stderr=output)

    def __enter__(self) -> str:
        url = f"http://127.0.0.1:{self._port}"
        try:
            wait(lambda: _is_ready(url), "a router that knows both workers", START)
        except BaseException:
            self.__exit__()
            raise
        return url

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=DEADLINE, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("toward", ["upstream", "clients"])
@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_flipped_bit_is_no_wrong_answer(relayed: Relayed, role: str, toward: Literal["clients", "upstream"]) -> None:
    right = relayed.tokens()
    relay, size = relayed.relays[role], relayed.bytes_of_an_answer(role, toward)
    chance, outcomes, struck = random.Random(SEED), Counter[str](), 0
    for at, bit in [(chance.randrange(size), chance.randrange(8)) for _ in range(PLACES)]:
        relay.arm(Fault("flip", toward, at=at, bit=bit))
        response = relayed.ask()
        struck += relay.struck.is_set()  # an answer that took less time has fewer lines, and may end before the place
        relay.disarm()
        if response.status_code == 200:
            told = response.json()["embferry"]["tokens"]
            outcomes["right" if told == right else f"wrong at {at}, bit {bit}"] += 1
        else:
            outcomes[response.json()["error"]["code"]] += 1
    errors = outcomes.keys() - {"right"}
    assert errors <= {"network_damage", "worker_failed", "no_worker"}, outcomes  # the client's request was right
    assert struck >= PLACES * 0.8
    assert outcomes["right"] >= PLACES * 0.8  # it is sent again, unless a wrong length is waited for
    assert relayed.tokens() == right
