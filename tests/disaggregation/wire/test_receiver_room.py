"""A room of a receiver: which statuses it accepts, and when it times out."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation.wire.messages import OriginWire
from embferry.disaggregation.wire.receiver_room import ReceiverRoom, Round
from embferry.protocol.errors import Aborted, LeaseExpired, LocalProtocolError, PeerGone, RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

WIRE = OriginWire(num_blocks=8, block_size=128)
SETTINGS = TransferSettings(bootstrap_timeout=30, waiting_timeout=120, transfer_timeout=10)
ROOM = 7


@dataclass
class Blocks:
    """Evidence in the blocks of a round."""

    total: int | None
    tokens: int

    def total_tokens(self) -> int | None:
        return self.total

    def written(self, tokens: int) -> bool:
        return self.tokens >= tokens


def new_room() -> ReceiverRoom:
    room = ReceiverRoom(ROOM, WIRE, SETTINGS, 1 << 20)
    room.begin(0)
    return room


def refusal(room: ReceiverRoom, status: KVPoll, evidence: Blocks | None, now: float) -> str:
    """Returns the reason for which a status is refused."""
    with pytest.raises(RemoteProtocolError) as refused:
        room.receive(status, evidence, now)
    return refused.value.detail


def test_a_single_transfer() -> None:
    room = new_room()
    assert room.status is KVPoll.Bootstrapping
    room.found()
    assert room.deadline is None, "waiting for blocks has no time-out"
    asked = room.ask((3, 0, 5), 1)
    assert asked == Round((3, 0, 5), 0, 384)
    assert room.status is KVPoll.WaitingForInput
    assert room.receive(KVPoll.WaitingForInput, Blocks(None, 0), 2) is None
    assert room.receive(KVPoll.Success, Blocks(300, 300), 3) == (asked, 300)
    assert (room.status, room.total_tokens, room.transferred_tokens) == (KVPoll.Success, 300, 300)
    assert refusal(room, KVPoll.Success, None, 4) == "the room is over"
    assert room.deadline is None


def test_a_resume_starts_where_the_last_transfer_ended() -> None:
    room = new_room()
    room.ask((3, 0), 0)
    assert not room.needs_resume
    assert room.receive(KVPoll.Transferring, Blocks(700, 256), 0) is not None
    assert room.needs_resume
    assert room.ask((1,), 0) == Round((1,), 256, 128)
    assert room.receive(KVPoll.Transferring, Blocks(None, 128), 0) is not None
    assert room.ask((1, 2, 3), 0) == Round((1, 2, 3), 384, 384)
    assert room.receive(KVPoll.Success, Blocks(None, 316), 0) == (Round((1, 2, 3), 384, 384), 316)


def test_repeated_early_and_late_statuses_change_nothing() -> None:
    room = new_room()
    assert "nothing was requested" in refusal(room, KVPoll.Success, None, 0)
    room.ask((3,), 0)
    assert "aux_datas" in refusal(room, KVPoll.Transferring, Blocks(None, 0), 0)
    assert "128 new tokens" in refusal(room, KVPoll.Transferring, Blocks(200, 127), 0)
    assert room.receive(KVPoll.Transferring, Blocks(200, 128), 0) is not None
    assert "repeated" in refusal(room, KVPoll.Transferring, None, 0)
    room.ask((4,), 0)
    assert "72 new tokens" in refusal(room, KVPoll.Success, Blocks(None, 71), 0)
    assert "Success must follow" in refusal(room, KVPoll.Transferring, Blocks(None, 72), 0)
    assert room.receive(KVPoll.Success, Blocks(None, 72), 0) is not None


@pytest.mark.parametrize("total", [-2, (1 << 20) + 1])
def test_an_impossible_length_fails_the_room(total: int) -> None:
    room = new_room()
    room.ask((3,), 0)
    assert room.receive(KVPoll.Transferring, Blocks(total, 128), 0) is None
    assert isinstance(room.error, RemoteProtocolError)
    assert room.error.room == ROOM


def test_success_before_the_last_token_fails_the_room() -> None:
    room = new_room()
    room.ask((3,), 0)
    assert room.receive(KVPoll.Success, Blocks(129, 128), 0) is None
    assert isinstance(room.error, RemoteProtocolError)
    assert room.round is not None, "its blocks may still be written to"


def test_the_first_error_of_a_room_stays() -> None:
    room = new_room()
    room.ask((3,), 0)
    assert room.receive(KVPoll.Failed, Blocks(None, 0), 0) is None
    assert isinstance(room.error, PeerGone)
    room.fail(Aborted("later"))
    assert isinstance(room.error, PeerGone)


def test_a_second_request_in_a_round_and_one_after_the_end_raise_an_error() -> None:
    room = new_room()
    room.ask((3,), 0)
    with pytest.raises(LocalProtocolError):
        room.ask((4,), 0)
    room.receive(KVPoll.Success, Blocks(1, 1), 0)
    with pytest.raises(LocalProtocolError):
        room.ask((4,), 0)


def test_every_state_that_waits_for_the_peer_has_a_time_out() -> None:
    for rounds, deadline, kind in ((0, 30, PeerGone), (1, 120, LeaseExpired), (2, 10, LeaseExpired)):
        room = new_room()
        for _ in range(rounds):
            room.ask((3,), 0)
            if rounds == 2 and room.rounds == 1:
                room.receive(KVPoll.Transferring, Blocks(200, 128), 0)
                assert room.deadline == 10
        assert room.deadline == deadline
        room.tick(deadline - 0.1)
        assert room.error is None
        room.tick(deadline)
        assert isinstance(room.error, kind)


def test_the_rest_must_be_requested_in_time() -> None:
    room = new_room()
    room.ask((3,), 0)
    room.receive(KVPoll.Transferring, Blocks(200, 128), 5)
    room.tick(15)
    assert isinstance(room.error, LeaseExpired)
    assert "no blocks were free" in room.error.detail


@given(
    st.integers(0, 2000),
    st.lists(st.tuples(st.sampled_from(KVPoll), st.integers(-1, 400), st.integers(1, 3)), max_size=40),
)
def test_only_tokens_in_the_blocks_count_for_any_statuses(total: int, statuses: list[tuple[KVPoll, int, int]]) -> None:
    room = new_room()
    for status, there, count in statuses:
        if not room.over and room.round is None:
            room.ask(tuple(range(count)), 0)
        before, asked = room.transferred_tokens, room.round
        shown = None if asked is None else Blocks(None if there < 0 else total, there)
        arrived = None
        with suppress(RemoteProtocolError):
            arrived = room.receive(status, shown, 0)
        if arrived is not None:
            assert arrived[0] is asked
            assert arrived[1] <= there
            assert room.transferred_tokens == before + arrived[1] <= total
            assert (status is KVPoll.Success) == (room.transferred_tokens == total)
        else:
            assert room.transferred_tokens == before
        if room.status is KVPoll.Success:
            assert room.transferred_tokens == total == room.total_tokens
