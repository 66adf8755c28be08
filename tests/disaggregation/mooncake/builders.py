"""Our two ends on engine doubles, and helpers for tests of both sides."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embferry.disaggregation.mooncake.conn_multimodal import (
    EncodeManager,
    LanguageManager,
    MooncakeEmbeddingBootstrapServer,
    MooncakeEmbeddingManager,
    MooncakeEmbeddingReceiver,
    OriginSettings,
    origin_layout,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings

from .engine_double import EngineNetwork
from .origin_peers import BLOCK, BLOCKS, DEEPSTACK, HIDDEN, Fields

GEOMETRY = Geometry(origin_layout(HIDDEN, DEEPSTACK), BLOCKS, BLOCK)
ROOM = 4611686018427387905
WAIT_S = 60.0


class PeerDouble:
    """An engine double with the interface that the peers of :mod:`origin_peers` use."""

    def __init__(self, network: EngineNetwork) -> None:
        self.engine = network.open()
        self.session_id = self.engine.segment
        self.register = self.engine.register

    def write(self, session: str, source: int, target: int, length: int) -> bool:
        return self.engine.outcome(self.engine.submit(session, source, target, length)) == 1


class StoppedClock:
    """The clock of a manager, which goes on when the test says so."""

    def __init__(self, manager: MooncakeEmbeddingManager) -> None:
        self._manager, self._seconds = manager, time.monotonic()
        manager.now = lambda: self._seconds  # type: ignore[method-assign]

    def pass_time(self, seconds: float) -> None:
        self._seconds += seconds
        self._manager.wake()


def encode_manager(
    network: EngineNetwork, *, transfer: TransferSettings | None = None, **settings: Any
) -> EncodeManager:
    return EncodeManager(GEOMETRY, settings=OriginSettings(**settings), transfer=transfer, open_engine=network.open)


def language_manager(
    network: EngineNetwork, *, transfer: TransferSettings | None = None, **settings: Any
) -> LanguageManager:
    return LanguageManager(GEOMETRY, settings=OriginSettings(**settings), transfer=transfer, open_engine=network.open)


def register_rank(bootstrap: MooncakeEmbeddingBootstrapServer, port: int, **sizes: int) -> str:
    """Registers the rank at ``port`` of this host as the origin does. Returns the address for receivers."""
    rank = {"role": "Encode", "tp_size": 1, "dp_size": 1, "rank_ip": "127.0.0.1", "rank_port": port, "engine_rank": 0}
    request = urllib.request.Request(
        f"{bootstrap.url}/route", json.dumps(rank | sizes).encode(), {"Content-Type": "application/json"}, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        assert response.status == 200
    return f"127.0.0.1:{bootstrap.port}"


def started(manager: LanguageManager, address: str, room: int = ROOM) -> MooncakeEmbeddingReceiver:
    """Returns a receiver that gets its blocks from the manager, after its ``init()``."""
    receiver = manager.open(room, address)
    receiver.init()
    return receiver


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {WAIT_S} s"
        time.sleep(0.001)


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if message.startswith("refused")]


def last_refusal(caplog: pytest.LogCaptureFixture) -> str:
    return next(reversed(refusals(caplog)), "")


def equal(ours: Fields, theirs: Fields) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
