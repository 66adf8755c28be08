"""A language side of ours, an encode side of the origin, and the servers between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import LanguageManager, MooncakeEmbeddingBootstrapServer
from embferry.protocol.settings import TransferSettings

from .builders import PeerDouble, language_manager, register_rank
from .engine_double import EngineNetwork
from .origin_peers import BLOCK, OriginSender


@pytest.fixture
def network() -> EngineNetwork:
    return EngineNetwork()


@pytest.fixture
def bootstrap() -> Iterator[MooncakeEmbeddingBootstrapServer]:
    with MooncakeEmbeddingBootstrapServer() as server:
        yield server


@pytest.fixture
def sender(network: EngineNetwork) -> Iterator[OriginSender]:
    sender = OriginSender(PeerDouble(network))
    yield sender
    sender.close()


@pytest.fixture
def address(bootstrap: MooncakeEmbeddingBootstrapServer, sender: OriginSender) -> str:
    return register_rank(bootstrap, sender.port)


@pytest.fixture
def manager(network: EngineNetwork) -> Iterator[LanguageManager]:
    with language_manager(network, transfer=TransferSettings(default_allocate_tokens=3 * BLOCK)) as manager:
        yield manager
