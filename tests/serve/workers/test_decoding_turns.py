"""The clients of the routers take turns on an encode worker's threads for decoding."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.serve.media.decoding.pool import PROCESSES
from tests.serve.blocking import Blocking
from tests.serve.pictures import png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import run

PICTURE = {"kind": "image", "data": png(80, 80, "blue")}
REQUESTS, PICTURES = 6, 3
OF_A_CLIENT = PROCESSES - 1
"""Pictures of one client that are decoded at the same time."""


@pytest.mark.parametrize("first_has", ["many requests", "one request with many pictures"])
def test_a_client_waits_for_no_picture_of_another_client(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, first_has: str
) -> None:
    joined = join()
    order: list[str] = []
    blocking, threads = Blocking(EncodeService.prepare), joined.encode._decoders

    def prepare(service: EncodeService, item: Any, room: Room) -> Any:
        order.append(room.client)
        return blocking(service, item, room)

    monkeypatch.setattr(EncodeService, "prepare", prepare)
    requests, pictures = (REQUESTS, PICTURES) if first_has == "many requests" else (OF_A_CLIENT, 16)

    async def ask() -> None:
        first = [
            asyncio.create_task(joined.post_encode(*[PICTURE] * pictures, room=room, whose="first"))
            for room in range(requests)
        ]
        while len(order) < OF_A_CLIENT or threads.waiting < requests - OF_A_CLIENT:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(joined.post_encode(PICTURE, room=requests, whose="other"))
        while len(order) < PROCESSES:
            await asyncio.sleep(0.001)
        assert order[OF_A_CLIENT:] == ["other"], "it has begun while those of the first client are being decoded"
        blocking.release.set()
        for answer in await asyncio.gather(*first, other):
            assert answer.status_code == 200

    try:
        run(ask())
    finally:
        for room in range(requests + 1):
            joined.encode.abort_room(room)
