"""Everything that a peer or a stranger can make the connector hold is bounded."""

from __future__ import annotations

import resource
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from embferry import CapacityError, Field, Layout
from embferry.connectors.shared.counters import Counters, MetricsServer
from embferry.connectors.shared.managers import MAX_LAYOUTS, Managers
from embferry.connectors.vllm.offers import Offers

from .pair import CONFIG, GUARD_S, Pair, until

pytestmark = pytest.mark.integration

FEW = msgspec.structs.replace(CONFIG, max_offers=2)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(FEW)
    yield made
    made.close()


def test_offers_are_bounded_by_number_also_those_of_one_embedding(pair: Pair) -> None:
    pair.publish("a")
    first, _ = pair.offer("a"), pair.offer("a", room=77)
    with pytest.raises(CapacityError, match="max_offers"):
        pair.producer.offer("a", 78)
    assert pair.offer("a") == first, "it is open already"
    pair.fetch("r", "a", first)
    until(lambda: pair.produced("offers_ended", "fetched") == 1)
    pair.offer("a", room=78)


def test_offers_leave_most_descriptors_to_others() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    offers = Offers(1, 1 << 40, claim_timeout=1.0, lease_timeout=1.0, on_end=lambda embedding, outcome: None)
    assert offers._most == files // 4


def layout(width: int) -> Layout:
    return Layout((Field("input_embeddings", "float32", width),))


class FakeManager:
    """A manager that does nothing."""

    fault = None

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_an_idle_layout_makes_room_and_a_busy_one_does_not() -> None:
    busy, made = {layout(8)}, []

    def make(wanted: Layout) -> FakeManager:
        made.append(FakeManager())
        return made[-1]

    managers = Managers[FakeManager](make, Counters(), is_busy=busy.__contains__)  # type: ignore[type-var]
    first = managers.get(layout(8))
    for width in range(16, 80, 8):
        managers.get(layout(width))
        until(lambda: sum(not one.is_closed for one in made) == MAX_LAYOUTS)
    assert managers.get(layout(8)) is first
    busy.add(layout(72))
    with pytest.raises(CapacityError, match="2 other layouts"):
        managers.get(layout(80))
    managers.close()
    assert all(one.is_closed for one in made)


def test_a_consumer_has_few_pools_of_all_the_widths_that_peers_name(pair: Pair) -> None:
    pair.publish("a")
    there = pair.offer("a")
    for multiple in range(1, 9):
        lie = msgspec.structs.replace(there, width=64 * multiple, room=there.room + multiple)
        pair.consumer.require(f"r{multiple}", f"lie {multiple}", lie)
        assert len(pair.consumer._managers._managers) <= MAX_LAYOUTS
        pair.consumer.release(f"r{multiple}")
    pair.fetch("r", "a", there)
    pair.consumer.require("one", "lie", msgspec.structs.replace(there, width=128, room=1))
    pair.consumer.require("two", "another", msgspec.structs.replace(there, width=192, room=2))
    with pytest.raises(CapacityError, match="other layouts"):
        pair.consumer.require("three", "a third", msgspec.structs.replace(there, width=256, room=3))


def test_strangers_who_hold_connections_do_not_keep_scrapers_out() -> None:
    with ExitStack() as held:
        server = MetricsServer(Counters(), "127.0.0.1", 0)
        held.callback(server.close)
        for _ in range(100):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=GUARD_S) as response:
            assert response.headers["content-type"].startswith("text/plain; version=")
            assert b"embferry_connector_tokens_total" in response.read()
        assert server._server.connections <= 32
