"""Inits that are refused, and the receivers that are told so: they have no time-out of their own."""

from __future__ import annotations

import pytest

from embferry.disaggregation.wire import sender_rooms as sender_rooms_module
from embferry.disaggregation.wire.sender_rooms import RefusedInitError, Report
from embferry.protocol.errors import RemoteProtocolError
from embferry.protocol.states import KVPoll
from tests.disaggregation.wire.messages import ROOM, SESSION, init, register, resume, session_of
from tests.disaggregation.wire.rooms import OTHER_POINTERS, begun, refusal, registered, report

FULL, UNKNOWN, MOVED, UNEVEN, TOO_MANY = "full", "unknown", "moved", "uneven", "too many"


@pytest.mark.parametrize("case", [FULL, UNKNOWN, MOVED, UNEVEN, TOO_MANY])
def test_the_receiver_of_a_refused_init_is_told(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, asked = registered(SESSION, session_of(1)), init()
    rooms.open(ROOM, 0)
    if case == FULL:
        monkeypatch.setattr(sender_rooms_module, "MAX_ROOMS", 1)
        asked = init(room=ROOM + 1)
    elif case == UNKNOWN:
        asked = init(session=session_of(2))
    elif case == MOVED:
        rooms.receive(init(), 0)
        assert refusal(rooms, register(pointers=OTHER_POINTERS))
        asked = init(room=ROOM + 1)
    elif case == UNEVEN:
        rooms.receive(init(session=session_of(1), ranks=2), 0)
        asked = init(ranks=3)
    else:
        rooms.receive(init(session=session_of(1)), 0)
    with pytest.raises(RefusedInitError) as refused:
        rooms.receive(asked, 1)
    assert refused.value.report == Report(int(asked[0]), "10.0.0.2", 41007, KVPoll.Failed)


BAD_INITS = {
    "another block size": init(allocated=3 * 64),
    "fewer blocks here": init(blocks=b"3,0,8"),
    "a block twice": init(blocks=b"3,0,3"),
    "no blocks": init(blocks=b"", allocated=0),
    "no ranks": init(ranks=0),
    "no number": [*init()[:6], b"many"],
}


@pytest.mark.parametrize("asked", BAD_INITS.values(), ids=BAD_INITS)
def test_the_receiver_of_an_init_that_cannot_be_read_is_told(asked: list[bytes]) -> None:
    rooms = registered()
    with pytest.raises(RefusedInitError) as refused:
        rooms.receive(asked, 1)
    assert refused.value.report == report(KVPoll.Failed)
    assert rooms.next_timeout() is None, "no room is opened"


BAD_HEADS = {
    "the room": [b"x", *init()[1:]],
    "the host": [init()[0], b"a b", *init()[2:]],
    "the port": [*init()[:2], b"0", *init()[3:]],
    "the session": [*init()[:3], b"h", *init()[4:]],
    "a resume": resume(allocated=1),
    "a registration": register(pointers=(0, 0, 0, 0)),
    "a long frame": [*init()[:4], b"1," * (1 << 20), *init()[5:]],
}


@pytest.mark.parametrize("message", BAD_HEADS.values(), ids=BAD_HEADS)
def test_nothing_is_reported_where_no_receiver_of_an_init_is_known(message: list[bytes]) -> None:
    told = message == BAD_HEADS["a long frame"]
    with pytest.raises(RemoteProtocolError) as refused:
        registered().receive(message, 1)
    assert isinstance(refused.value, RefusedInitError) == told


@pytest.mark.parametrize(
    "message",
    [init(), resume(16), *BAD_INITS.values()],
    ids=["init", "resume", *(f"init: {name}" for name in BAD_INITS)],
)
@pytest.mark.parametrize("state", ["not opened", "waits for the embedding", "waits for another rank", "transferring"])
def test_a_repeated_request_of_a_live_room_fails_nothing(message: list[bytes], state: str) -> None:
    rooms = begun()
    if state != "transferring":
        rooms = registered()
        rooms.receive(init(ranks=1 + (state == "waits for another rank")), 0)
        if state != "not opened":
            rooms.open(ROOM, 0)
    with pytest.raises(RemoteProtocolError) as refused:
        rooms.receive(message, 1)
    assert not isinstance(refused.value, RefusedInitError)
