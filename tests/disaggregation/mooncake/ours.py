"""Our two ends on engine doubles, and what both test sides need of them."""

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
    MooncakeEmbeddingReceiver,
    OriginSettings,
    origin_layout,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings

from .double import World
from .origin_peers import BLOCK, BLOCKS, DEEPSTACK, HIDDEN, Fields

GEOMETRY = Geometry(origin_layout(HIDDEN, DEEPSTACK), BLOCKS, BLOCK)
ROOM = 4611686018427387905
DEADLINE_S = 20.0


class DoubleEngine:
    """A double as the scripted peers use an engine."""

    def __init__(self, world: World) -> None:
        self.engine = world.open()
        self.session_id = self.engine.segment
        self.register = self.engine.register

    def write(self, session: str, source: int, target: int, length: int) -> bool:
        return self.engine.outcome(self.engine.submit(session, source, target, length)) == 1


def encode_manager(world: World, *, transfer: TransferSettings | None = None, **settings: Any) -> EncodeManager:
    return EncodeManager(GEOMETRY, settings=OriginSettings(**settings), transfer=transfer, open_engine=world.open)


def language_manager(world: World, *, transfer: TransferSettings | None = None, **settings: Any) -> LanguageManager:
    return LanguageManager(GEOMETRY, settings=OriginSettings(**settings), transfer=transfer, open_engine=world.open)


def routed(bootstrap: MooncakeEmbeddingBootstrapServer, port: int, **sizes: int) -> str:
    """Registers a rank at ``port`` of this host, the origin's way; the address receivers are given."""
    rank = {"role": "Encode", "tp_size": 1, "dp_size": 1, "rank_ip": "127.0.0.1", "rank_port": port, "engine_rank": 0}
    request = urllib.request.Request(
        f"{bootstrap.url}/route", json.dumps(rank | sizes).encode(), {"Content-Type": "application/json"}, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
    return f"127.0.0.1:{bootstrap.port}"


def opened(manager: LanguageManager, address: str, room: int = ROOM) -> MooncakeEmbeddingReceiver:
    receiver = manager.open(room, address)
    receiver.init()
    return receiver


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {DEADLINE_S} s"
        time.sleep(0.001)


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if message.startswith("refused")]


def last_refusal(caplog: pytest.LogCaptureFixture) -> str:
    return next(reversed(refusals(caplog)), "")


def equal(ours: Fields, theirs: Fields) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
