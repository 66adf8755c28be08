from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel
from embferry.engine.reference import Reference
from embferry.models import model_path
from embferry.transports.contract import Transport
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport
from tests.serve.workers.joined import CHUNK, Joined, Models, settings_for

TRANSPORTS: tuple[type[Transport], ...] = (InMemoryTransport, ShmTransport, TcpTransport, HttpTransport)


@pytest.fixture(scope="session")
def models() -> Models:
    path, dtype = model_path("shapes"), torch.float32
    return Models(
        Encoder.load(path, dtype),
        LanguageModel.load(path, dtype, prefill_chunk_tokens=CHUNK),
        Reference.load(path, dtype, prefill_chunk_tokens=CHUNK),
    )


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


MakeJoined = Callable[..., Any]
