from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from embferry.connectors.vllm.config import ConnectorConfig
from tests.ports import free_port

from ..pair import CONFIG, Encode
from .builders import Engine, There


@pytest.fixture
def config() -> ConnectorConfig:
    return msgspec.structs.replace(CONFIG, transports=("tcp",), ranks_port=free_port())


@pytest.fixture
def encode(config: ConnectorConfig) -> Iterator[Encode]:
    with closing(Encode(config)) as made:
        yield made


@pytest.fixture
def engine(config: ConnectorConfig) -> Iterator[Engine]:
    with closing(Engine(config)) as made:
        yield made


@pytest.fixture
def there(config: ConnectorConfig, engine: Engine) -> Iterator[There]:
    with closing(There(config)) as made:
        yield made
