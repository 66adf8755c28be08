"""Strangers that ask for embeddings, answers and what the workers know."""

from __future__ import annotations

import pytest

from embferry.protocol.messages import Open, TransportAddress
from tests.strangers.busy import GEOMETRY
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


def test_strangers_read_no_embedding_even_if_they_know_its_room(running: Running, stranger: Stranger) -> None:
    with running.untouched(asking=True), running.live_room() as room:
        stranger.request("encode", "GET", f"/embeddings/{room}")
        transports = (TransportAddress("tcp", b"nowhere"),)
        stranger.send_frames(Open(room, 1, (1, 1), GEOMETRY, "stranger", transports, 0))
        for token in ("0" * 32, "f" * 32):
            stranger.request("http", "GET", f"/embferry/1/{token}")
            stranger.request("http", "GET", f"/embferry/1/{token}/1")


def test_strangers_read_nothing_else_of_workers(running: Running, stranger: Stranger) -> None:
    with running.untouched():
        stranger.request("language", "GET", "/debug/pool")
        stranger.request("encode", "GET", "/debug/rooms")
        for role in ("encode", "language"):
            for path in ("/", "/docs", "/openapi.json", "/v1/models", "//health/../debug/pool"):
                stranger.request(role, "GET", path)
