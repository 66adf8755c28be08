"""The clients of the routers take turns on an encode worker's encoder, item by item."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from tests.serve.blocking import Blocking
from tests.serve.pictures import png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import run

REQUESTS = 4


def test_a_client_waits_for_one_item_of_another_client(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join()
    order: list[str] = []
    blocking, service = Blocking(EncodeService._encode_next), joined.encode

    def encode_next(service: EncodeService, room: Room, sender: Any) -> bool:
        order.append(room.client)
        return bool(blocking(service, room, sender))

    monkeypatch.setattr(EncodeService, "_encode_next", encode_next)

    async def ask() -> None:
        for room in range(REQUESTS + 1):
            items = [{"kind": "image", "data": png(80, 80, f"rgb({room},{n},0)")} for n in range(2)]
            whose = "first" if room < REQUESTS else "other"
            assert (await joined.post_encode(*items, room=room, whose=whose)).status_code == 200
            opened = service.room(room)
            assert opened is not None
            service.claim(opened)
        blocking.release.set()
        while len(order) < 2 * (REQUESTS + 1):
            await asyncio.sleep(0.001)

    try:
        run(ask())
        assert "other" in order[:3], "behind the item that had begun, and one more at most"
        assert order[:6].count("other") == 2, "every second one"
    finally:
        for room in range(REQUESTS + 1):
            service.abort_room(room)
