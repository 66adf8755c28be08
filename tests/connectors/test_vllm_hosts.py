"""Producer and consumer on two hosts: network name spaces of this machine, joined by a virtual cable.

They share a kernel and its memory but no interface, loopback and abstract sockets included, so they can only reach each
other over the cable. These tests need root and iproute2's ``ip``.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embferry.trust.keys import Key

from .engines import Engine, picture, reference

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

TEXT = {"type": "text", "text": "What is this?"}
PRODUCER, CONSUMER = "10.77.0.1", "10.77.0.2"
KEY = Key.new().written()
"""Without it, nothing listens on an address that is not loopback."""
POOL = {"num_blocks": 4, "block_size": 8, "peer_timeout": 5.0}


def ip(*words: str) -> None:
    """Runs ``ip``. Raises CalledProcessError with its output."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Host:
    space: str
    port: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space, *words]

    def unplug(self) -> None:
        ip("-n", self.space, "link", "set", self.port, "down")

    def plug(self) -> None:
        ip("-n", self.space, "link", "set", self.port, "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    hosts = tuple(
        Host(f"embferry-{os.getpid()}-{side}", f"port-{side}", address)
        for side, address in (("a", PRODUCER), ("b", CONSUMER))
    )
    made = []
    try:
        for host in hosts:
            ip("netns", "add", host.space)
            made.append(host)
        one, other = hosts
        ip("link", "add", one.port, "netns", one.space, "type", "veth", "peer", other.port, "netns", other.space)
        for host in hosts:
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.port)
            ip("-n", host.space, "link", "set", "lo", "up")
            host.plug()
        yield one, other
    finally:
        for host in made:
            ip("netns", "del", host.space)


@dataclass
class Split:
    producer: Engine
    consumer: Engine
    cable: Host

    def encode(self, item: dict[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = self.producer.ask(item)["params"]
        return params

    def answer(self, item: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        (entry,) = params.values()
        return self.consumer.ask(reference(item, entry), TEXT, params=params)

    def undivided(self, item: dict[str, Any]) -> dict[str, Any]:
        """Asks the consumer without coordinates, so that it encodes the item itself."""
        return self.consumer.ask(item | {"uuid": f"{item['uuid']}-undivided"}, TEXT)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    folder: Path = tmp_path_factory.mktemp("hosts")
    make(folder / "model")
    with two_hosts() as (here, there):
        engines = []
        try:
            for role, host in (("ec_producer", here), ("ec_consumer", there)):
                transfer = {
                    "ec_connector": "EmbferryConnector",
                    "ec_connector_module_path": "embferry.connectors.vllm.connector",
                    "ec_role": role,
                    "ec_connector_extra_config": POOL | {"transports": ["shm", "tcp"], "host": host.address},
                }
                prefix = host.command("env", f"VLLM_HOST_IP={host.address}", f"EMBFERRY_CLUSTER_KEY={KEY}")
                engines.append(Engine(folder / "model", folder / f"{role}.log", transfer, prefix=prefix))
            for engine in engines:
                engine.started()
            yield Split(*engines, cable=there)
        finally:
            for engine in engines:
                engine.end()
            for engine in engines:
                engine.close()


def test_tokens_are_those_of_an_undivided_engine(split: Split) -> None:
    """Both sides prefer shared memory, which cannot cross the cable, so sockets carry the data."""
    for item in (picture(1), picture(2, 896, 896)):
        params = split.encode(item)
        (entry,) = params.values()
        assert entry["embferry"]["endpoint"].startswith(f"tcp://{PRODUCER}:")
        answer = split.answer(item, params)
        assert answer["reason"] == "length"
        assert answer["tokens"] == split.undivided(item)["tokens"]


def test_a_transfer_survives_a_short_interruption(split: Split) -> None:
    item = picture(3, 896, 896)
    params, whole = split.encode(item), split.undivided(item)
    split.cable.unplug()
    back = threading.Timer(0.4, split.cable.plug)
    back.start()
    try:
        answer = split.answer(item, params)
    finally:
        back.join()
    assert answer["tokens"] == whole["tokens"]


def test_a_request_fails_alone_while_the_cable_is_out(split: Split) -> None:
    """The next request succeeds once the cable is back."""
    item = picture(4, 896, 896)
    params = split.encode(item)
    split.cable.unplug()
    try:
        failed = split.answer(item, params)
    finally:
        split.cable.plug()
    assert failed["reason"] == "error"
    assert "cannot obtain its embedding" in split.consumer.log.read_text()
    assert split.answer(item, split.encode(item))["tokens"] == split.undivided(item)["tokens"]
