from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from embferry.transports.contract import Transport
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport
from tests import lock_order
from tests.serve.workers.joined import Joined, Models, settings_for

TRANSPORTS: tuple[type[Transport], ...] = (InMemoryTransport, ShmTransport, TcpTransport, HttpTransport)


@pytest.fixture(scope="session")
def models() -> Models:
    return Models.load()


@pytest.fixture(params=TRANSPORTS, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> type[Transport]:
    return request.param


@pytest.fixture
def join(models: Models) -> Iterator[Callable[..., Joined]]:
    """Returns a function that makes joined workers; after the test they must be idle and have lost no block."""
    with ExitStack() as stack:
        yield lambda transport=InMemoryTransport, **settings: stack.enter_context(
            Joined(models, transport, settings_for(**settings))
        )


@pytest.fixture(autouse=True)
def _lock_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with lock_order.checked(monkeypatch):
        yield


MakeJoined = Callable[..., Any]
