"""A language side of ours, an encode side of the origin, and what brings them together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import LanguageManager, MooncakeEmbeddingBootstrapServer
from embferry.protocol.settings import TransferSettings

from .double import World
from .origin_peers import BLOCK, OriginSender
from .ours import DoubleEngine, language_manager, routed


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def bootstrap() -> Iterator[MooncakeEmbeddingBootstrapServer]:
    with MooncakeEmbeddingBootstrapServer() as server:
        yield server


@pytest.fixture
def sender(world: World) -> Iterator[OriginSender]:
    sender = OriginSender(DoubleEngine(world))
    yield sender
    sender.close()


@pytest.fixture
def address(bootstrap: MooncakeEmbeddingBootstrapServer, sender: OriginSender) -> str:
    return routed(bootstrap, sender.port)


@pytest.fixture
def manager(world: World) -> Iterator[LanguageManager]:
    with language_manager(world, transfer=TransferSettings(default_allocate_tokens=3 * BLOCK)) as manager:
        yield manager
