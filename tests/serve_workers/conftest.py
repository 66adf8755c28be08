from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.http.conn_multimodal import HttpTransport
from embferry.disaggregation.memory.conn_multimodal import MemoryTransport
from embferry.disaggregation.shm.conn_multimodal import ShmTransport
from embferry.disaggregation.tcp.conn_multimodal import TcpTransport
from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel
from embferry.engine.reference import Reference
from embferry.models import model_path
from tests.serve_workers.joined import CHUNK, Joined, Models, settings_for

TRANSPORTS: tuple[type[Transport], ...] = (MemoryTransport, ShmTransport, TcpTransport, HttpTransport)


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
    """Makes joined workers; after the test they must be whole and idle."""
    with ExitStack() as stack:
        yield lambda transport=MemoryTransport, **settings: stack.enter_context(
            Joined(models, transport, settings_for(**settings))
        )


MakeJoined = Callable[..., Any]
