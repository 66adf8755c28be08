"""A consumer with two tensor-parallel ranks on two hosts, which are network name spaces as in ``test_vllm_hosts``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .engines import Engine, picture, reference
from .split import TEXT, transfer
from .test_vllm_hosts import CONSUMER, KEY, POOL, PRODUCER, Host, two_hosts

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

RANKS_PORT, MASTER_PORT = 9400, 29501
LIMIT_THERE = 600 * 256 * 4
"""The host of rank 1 takes no more bytes: less than the 1,024 tokens of the largest picture."""
OUT_S = 8.0
"""Time without a cable: more than ``peer_timeout``."""
PRODUCES, LEADS = PRODUCER, CONSUMER
"""The first host encodes, and runs rank 1; the second runs the scheduler and rank 0."""


@dataclass
class Split:
    producer: Engine
    consumer: Engine
    cable: Host

    def encode(self, item: dict[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = self.producer.ask(item)["params"]
        return params

    def message(self, item: dict[str, Any], params: dict[str, Any]) -> list[dict[str, Any]]:
        (entry,) = params.values()
        return [reference(item, entry), TEXT]

    def answer(self, item: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        return self.consumer.ask(*self.message(item, params), params=params)

    def undivided(self, item: dict[str, Any]) -> dict[str, Any]:
        """Asks the consumer without coordinates, so that its ranks encode the item themselves."""
        return self.consumer.ask(item | {"uuid": f"{item['uuid']}-undivided"}, TEXT)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    folder: Path = tmp_path_factory.mktemp("rank-hosts")
    make(folder / "model")
    over_hosts = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "nnodes": 2,
        "master_addr": LEADS,
        "master_port": MASTER_PORT,
    }
    with two_hosts() as (first, second):
        engines: list[Engine] = []

        def start(name: str, role: str, host: Host, limit: int = 1 << 30, **options: Any) -> None:
            settings = POOL | {"host": host.address, "ranks_port": RANKS_PORT, "max_embedding_bytes": limit}
            given = transfer(role, transports=["shm", "tcp"], **settings)
            variables = (f"VLLM_HOST_IP={host.address}", f"GLOO_SOCKET_IFNAME={host.port}")
            prefix = host.command("env", *variables, f"EMBFERRY_CLUSTER_KEY={KEY}")
            engines.append(Engine(folder / "model", folder / f"{name}.log", given, prefix=prefix, **options))

        try:
            start("producer", "ec_producer", first)
            start("rank-0", "ec_consumer", second, node_rank=0, **over_hosts)
            start("rank-1", "ec_consumer", first, LIMIT_THERE, node_rank=1, **over_hosts)
            for engine in engines:
                engine.started()
            yield Split(*engines[:2], cable=second)
        finally:
            for engine in engines:
                engine.end()
            for engine in engines:
                engine.close()


def test_tokens_are_those_of_an_undivided_engine(split: Split) -> None:
    for item in (picture(1), picture(2, 448, 448), picture(3)):
        answer = split.answer(item, split.encode(item))
        assert answer["reason"] == "length"
        assert answer["tokens"] == split.undivided(item)["tokens"]
    assert split.consumer.refresh()["transfers"] == 3


def test_requests_at_the_same_time(split: Split) -> None:
    items = [picture(seed, 448, 448) for seed in range(11, 15)]
    params = [split.encode(item) for item in items]
    asked = [(split.message(item, given), given) for item, given in zip(items, params, strict=True)]
    for item, answer in zip(items, split.consumer.ask_all(asked), strict=True):
        assert answer["tokens"] == split.undivided(item)["tokens"]


def test_more_than_the_other_host_asks_for_at_once(split: Split) -> None:
    items = [picture(seed) for seed in range(21, 41)]
    params = [split.encode(item) for item in items]
    asked = [(split.message(item, given), given) for item, given in zip(items, params, strict=True)]
    answers = split.consumer.ask_all(asked)
    assert [answer["reason"] for answer in answers] == ["length"] * len(items)
    assert answers[-1]["tokens"] == split.undivided(items[-1])["tokens"]


def test_an_embedding_that_the_other_host_cannot_take_fails_the_request_alone(split: Split) -> None:
    """Its workers go on, and the next request runs."""
    item, small = picture(50, 896, 896), picture(51)
    failed = split.answer(item, split.encode(item))
    assert failed["reason"] == "error"
    assert "host 1 of this engine cannot take an embedding" in split.consumer.log.read_text()
    assert split.answer(small, split.encode(small))["tokens"] == split.undivided(small)["tokens"]


def test_ranks_go_on_after_the_cable_was_out(split: Split) -> None:
    """Meanwhile vLLM's own steps wait, because each needs both ranks. Then the other host claims embeddings again."""
    lost, later = picture(60), picture(61)
    params = split.encode(lost)
    split.cable.unplug()
    back = threading.Timer(OUT_S, split.cable.plug)
    back.start()
    try:
        split.answer(lost, params)
    finally:
        back.join()
    assert split.answer(later, split.encode(later))["tokens"] == split.undivided(later)["tokens"]
