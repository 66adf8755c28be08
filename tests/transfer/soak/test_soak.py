"""A small soak: equal bytes, and nothing left behind; and its picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from tests.transfer.soak.pair import running_pair
from tests.transfer.soak.plot import svg
from tests.transfer.soak.rooms import MAX_TOKENS, Room
from tests.transfer.soak.soak import Soak

TRANSFERS = 2_000


@pytest.mark.integration
@pytest.mark.sweeps
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_two_thousand_transfers_leave_nothing_behind(transport: str) -> None:
    with running_pair(transport, seed=1) as pair:
        soak = Soak(pair, seed=1)
        soak.run(TRANSFERS)
        soak.check()
        result = soak.result()
    for role in ("sending", "receiving"):
        ended = {(planned, outcome): times for planned, outcome, times in result["outcomes"][role]}
        assert sum(ended.values()) == TRANSFERS
        assert ended["delivered", "delivered"] > 0.8 * TRANSFERS
        for planned in ("sender aborts", "receiver aborts"):
            assert ended[planned, "aborted"] > 0.02 * TRANSFERS
    assert ("refused", "capacity_exhausted") in {(planned, how) for planned, how, _ in result["outcomes"]["receiving"]}
    assert result["refused_allocations"] > 0
    assert result["strikes"]["control"] > 0
    assert (result["strikes"]["data"] > 0) == (transport == "tcp")


def test_a_room_is_the_same_at_both_ends_and_any_size() -> None:
    rooms = [Room.drawn(3, number) for number in range(1000)]
    assert rooms == [Room.drawn(3, number) for number in range(1000)]
    assert min(room.tokens for room in rooms) == 1
    assert max(room.tokens for room in rooms) > 0.9 * MAX_TOKENS
    assert all(room.pieces[-1] == room.tokens for room in rooms)


def test_the_picture_of_a_soak() -> None:
    def sample(transfers: int) -> dict[str, Any]:
        signs = {"rss": transfers << 20, "fds": 7, "threads": 3}
        return {"transfers": transfers, "seconds": 1.0, "sending": signs, "receiving": signs}

    result = {"transport": "shm", "samples": [sample(transfers) for transfers in range(1, 1001)]}
    root = ElementTree.fromstring(svg([result, result]))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 3 * 4
    assert all(len(line.attrib["points"].split()) == 200 for line in lines)
