"""Look-ups of encode ranks at a bootstrap server that is silent."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from embferry.disaggregation.mooncake.encode_ranks import EncodeSide
from embferry.disaggregation.mooncake.settings import OriginSettings
from embferry.protocol.errors import PeerGone

pytestmark = pytest.mark.integration

ROOMS = 50
SECONDS = 60.0


def test_a_silent_bootstrap_server_is_asked_once_for_all_rooms():
    """The kernel accepts the connections of a listening socket; nothing answers on them."""
    with socket.create_server(("127.0.0.1", 0), backlog=ROOMS) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        side = EncodeSide(url, OriginSettings(), lambda: None, lambda: None)
        side._client.timeout_s = 0.2
        found, done = [], threading.Semaphore(0)
        for room in range(ROOMS):
            side.find(room, time.monotonic(), lambda result: (found.append(result), done.release()))
        for _ in range(ROOMS):
            assert done.acquire(timeout=SECONDS)
        side.stop()
        assert {type(result) for result in found} == {PeerGone}
        silent.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
        assert 1 <= asked < ROOMS  # once for each batch of rooms that the thread has found in its queue
