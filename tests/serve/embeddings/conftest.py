"""An encode worker with its real HTTP server, in this process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
import uvicorn

from embferry.engine.encoder import Encoder
from embferry.serve.config import EncodeSettings, Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.encode.preparation import prepare
from embferry.serve.encode.process import build, service_of
from embferry.serve.http.serving import KEEP_ALIVE_SECONDS, listen
from embferry.testing.pair import eventually
from embferry.transports.in_memory.transport import InMemoryTransport
from tests.serve.digested import digested
from tests.serve.pictures import encoded, noise
from tests.serve.workers.joined import Models

PICTURE = {"kind": "image", "data": encoded(noise(224, 160))}
OTHER = {"kind": "image", "data": encoded(noise(120, 100))}
CLIENT_TIMEOUT = 100
"""Seconds a request may take; a guard against hangs."""


class EncodeWorker:
    """A running encode worker. A context manager: at its end it stops all threads and checks that no room is left."""

    def __init__(self, encoder: Encoder, **encode: Any) -> None:
        self.encoder = encoder
        self.settings = Settings(encode=EncodeSettings(**encode))
        self.transport = InMemoryTransport()
        self.service = service_of(encoder, self.settings, [self.transport])
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(build(self.service), log_config=None, lifespan="off", timeout_keep_alive=KEEP_ALIVE_SECONDS)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="uvicorn")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=CLIENT_TIMEOUT, trust_env=False)

    def __enter__(self) -> EncodeWorker:
        self._thread.start()
        eventually(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.service.close()
        self._server.should_exit = True
        self._thread.join(CLIENT_TIMEOUT)
        assert not self._thread.is_alive()
        self._listener.close()
        assert self.service.fault is None
        assert self.service.load == 0

    def open(self, *items: dict[str, Any]) -> int:
        """Announces an embedding of ``items``; returns its room."""
        room = secrets.randbits(60)
        body = msgspec.msgpack.encode({"room": room, "request_id": "test", "items": items})
        response = self.http.post("/encode", content=body, auth=digested)
        assert response.status_code == 200, response.text
        return room

    def expected(self, *items: dict[str, Any]) -> bytes:
        """Returns the embedding as one byte string: the tokens in order, each with its fields in order."""
        torch.set_num_threads(self.settings.threads)
        prepared = prepare([EncodeItem(**item) for item in items], self.encoder.media, self.settings.media)
        embeddings = [self.encoder.encode(item).fields() for item in prepared]
        names = [field.name for field in self.encoder.fields]
        return b"".join(np.concatenate([rows[name] for name in names], axis=1).tobytes() for rows in embeddings)


@pytest.fixture(scope="session")
def models() -> Models:
    return Models.load()


@pytest.fixture
def start(models: Models) -> Iterator[Callable[..., EncodeWorker]]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(EncodeWorker(models.encoder, **settings))


@pytest.fixture
def worker(start: Callable[..., EncodeWorker]) -> EncodeWorker:
    return start()
