"""Look-ups of encode ranks: bootstrap servers that are silent, and those that answer before their ranks are there."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from embferry.disaggregation.mooncake.encode_ranks import EncodeSide
from embferry.disaggregation.mooncake.settings import OriginSettings
from embferry.protocol.errors import PeerGone, RemoteProtocolError
from embferry.protocol.states import KVPoll

from .builders import ROOM, WAIT_S, StoppedClock, equal, eventually, started
from .origin_peers import OriginBootstrap, embedding

pytestmark = pytest.mark.integration

ROOMS = 50
NO_SIZES, HALF_SIZES, SIZES = (None, None), (1, None), (1, 1)
NULLS = 200, b'{"rank_ip": null, "rank_port": null}'
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


EARLY = {
    "no sizes": (NO_SIZES, NULLS),
    "half of the sizes": (HALF_SIZES, NULLS),
    "a rank of nulls": (SIZES, NULLS),
    "no rank at all": (SIZES, (200, b"null")),
    "a rank that is not found": (SIZES, (404, b"Bootstrap info not Found")),
    "an internal error": (SIZES, (500, b"500 Internal Server Error")),
}


@pytest.mark.parametrize(("sizes", "missing"), EARLY.values(), ids=EARLY)
def test_a_bootstrap_server_that_is_up_before_its_rank_is_asked_until_the_rank_is_there(
    manager, sender, sizes, missing
):
    early = OriginBootstrap()
    early.sizes, early.missing = sizes, missing
    rows = embedding(8)
    sender.encode(rows)
    with early.running():
        receiver = started(manager, early.address)
        first = (0, 0) if sizes == SIZES else (-1, -1)
        eventually(lambda: early.asked.count(first) >= 2)
        assert receiver.poll() is KVPoll.Bootstrapping
        early.ranks[0, 0], early.sizes = sender.port, SIZES
        sender.answer(sender.hear())
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), rows)
        receiver.clear()


def test_a_rank_that_never_comes_fails_the_room_when_its_time_is_over_and_delays_no_other(manager, sender):
    """The first room is served by data-parallel group 1, whose rank does not register."""
    half = OriginBootstrap()
    half.sizes, half.ranks[0, 0] = (2, 2), sender.port
    rows = embedding(8)
    sender.encode(rows)
    with half.running():
        assert ROOM % 2 == 1
        waiting = started(manager, half.address)
        eventually(lambda: (1, 0) in half.asked)
        receiver = started(manager, half.address, ROOM + 1)
        sender.answer(sender.hear())
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), rows)
        assert waiting.poll() is KVPoll.Bootstrapping
        clock = StoppedClock(manager)
        clock.pass_time(31)
        with pytest.raises(PeerGone):
            waiting.wait(WAIT_S)
        receiver.clear()


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"embedding_tp_size": 0, "embedding_dp_size": 1}'])
def test_a_malformed_answer_fails_the_room_at_once(manager, body):
    wrong = OriginBootstrap()
    wrong.answer = lambda _: (200, body)  # type: ignore[method-assign]
    with wrong.running(), pytest.raises(RemoteProtocolError):
        started(manager, wrong.address).wait(WAIT_S)
