"""A producer encodes each picture once while the connector keeps it, though vLLM's encoder cache holds only one."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry.connectors.vllm.config import ConnectorConfig
from embferry.connectors.vllm.coordinates import Coordinates
from tests.ports import free_port

from .engines import Content, Engine, picture
from .pair import GUARD_S, Language
from .split import transfer

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

ONE_AT_A_TIME = 1280
"""Size of vLLM's encoder cache in tokens. A picture of 896 × 896 has 1,024."""


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def producer(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    folder: Path = tmp_path_factory.mktemp("encodes")
    make(folder / "model")
    config = transfer("ec_producer", transports=["shm"], metrics_port=port)
    sizes = {"max_num_batched_tokens": ONE_AT_A_TIME, "max_model_len": ONE_AT_A_TIME}
    engine = Engine(folder / "model", folder / "producer.log", config, **sizes)
    try:
        engine.started()
        yield engine
    finally:
        engine.close()


def encode(producer: Engine, item: Content) -> Coordinates:
    params: dict[str, Any] = producer.ask(item)["params"]
    ((_, entry),) = params.items()
    return msgspec.convert(entry["embferry"], Coordinates)


def test_each_picture_is_encoded_once(producer: Engine, port: int) -> None:
    first, second = picture(1, 896, 896), picture(2, 896, 896)
    asked = [encode(producer, item) for item in (first, second, first, second, first)]
    digests = [coordinates.digest for coordinates in asked]
    assert digests == [digests[0], digests[1]] * 2 + [digests[0]]
    assert digests[0] != digests[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=GUARD_S) as response:
        found = dict(re.findall(r"^embferry_connector_(\w+_total) (\S+)$", response.read().decode(), re.MULTILINE))
    assert (found["items_encoded_total"], found["encodes_saved_total"]) == ("2.0", "3.0")
    language = Language(ConnectorConfig(transports=("shm",), peer_timeout=GUARD_S))
    try:
        rows = [language.fetch(str(at), str(at), coordinates) for at, coordinates in enumerate(asked)]
        assert np.array_equal(rows[0], rows[2])
        assert np.array_equal(rows[1], rows[3])
    finally:
        language.close()
