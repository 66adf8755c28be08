"""One receiver's side of a room: which statuses are believed, and when it gives up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation.wire.frames import OriginWire
from embferry.disaggregation.wire.reception import Arrived, Dropped, Reception, Round
from embferry.protocol.errors import Aborted, LeaseExpired, LocalProtocolError, PeerGone, RemoteProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

WIRE = OriginWire(num_blocks=8, block_size=128)
SETTINGS = TransferSettings(bootstrap_timeout=30, waiting_timeout=120, transfer_timeout=10)
ROOM = 7


@dataclass
class Blocks:
    """What the blocks of a round show."""

    total: int | None
    tokens: int

    def total_tokens(self) -> int | None:
        return self.total

    def written(self, tokens: int) -> bool:
        return self.tokens >= tokens


def reception(now: float = 0) -> Reception:
    return Reception(ROOM, WIRE, SETTINGS, 1 << 20, now)


def dropped(outcome: object) -> str:
    assert isinstance(outcome, Dropped)
    return outcome.reason


def test_a_single_transfer() -> None:
    room = reception()
    assert room.status is KVPoll.Bootstrapping
    room.found()
    assert room.deadline is None, "it may have to wait for blocks"
    asked = room.ask((3, 0, 5), 1)
    assert asked == Round((3, 0, 5), 0, 384)
    assert room.status is KVPoll.WaitingForInput
    assert room.heard(KVPoll.WaitingForInput, Blocks(None, 0), 2) is None
    assert room.heard(KVPoll.Success, Blocks(300, 300), 3) == Arrived(asked, 300)
    assert (room.status, room.total_tokens, room.transferred_tokens) == (KVPoll.Success, 300, 300)
    assert dropped(room.heard(KVPoll.Success, None, 4)) == "the room is over"
    assert room.deadline is None


def test_resumes_start_where_the_last_one_ended() -> None:
    room = reception()
    room.ask((3, 0), 0)
    assert not room.needs_resume
    assert isinstance(room.heard(KVPoll.Transferring, Blocks(700, 256), 0), Arrived)
    assert room.needs_resume
    assert room.ask((1,), 0) == Round((1,), 256, 128)
    assert isinstance(room.heard(KVPoll.Transferring, Blocks(None, 128), 0), Arrived)
    assert room.ask((1, 2, 3), 0) == Round((1, 2, 3), 384, 384)
    assert room.heard(KVPoll.Success, Blocks(None, 316), 0) == Arrived(Round((1, 2, 3), 384, 384), 316)


def test_what_is_repeated_early_or_late_changes_nothing() -> None:
    room = reception()
    assert "nothing was asked for" in dropped(room.heard(KVPoll.Success, None, 0))
    room.ask((3,), 0)
    assert "aux_datas" in dropped(room.heard(KVPoll.Transferring, Blocks(None, 0), 0))
    assert "128 new tokens" in dropped(room.heard(KVPoll.Transferring, Blocks(200, 127), 0))
    assert isinstance(room.heard(KVPoll.Transferring, Blocks(200, 128), 0), Arrived)
    assert "said before" in dropped(room.heard(KVPoll.Transferring, None, 0))
    room.ask((4,), 0)
    assert "72 new tokens" in dropped(room.heard(KVPoll.Success, Blocks(None, 71), 0))
    assert "Success must follow" in dropped(room.heard(KVPoll.Transferring, Blocks(None, 72), 0))
    assert isinstance(room.heard(KVPoll.Success, Blocks(None, 72), 0), Arrived)


@pytest.mark.parametrize("total", [-2, (1 << 20) + 1])
def test_an_impossible_length_is_the_peers_failure(total: int) -> None:
    room = reception()
    room.ask((3,), 0)
    assert room.heard(KVPoll.Transferring, Blocks(total, 128), 0) is None
    assert isinstance(room.error, RemoteProtocolError)
    assert room.error.room == ROOM


def test_success_before_the_end_is_the_peers_failure() -> None:
    room = reception()
    room.ask((3,), 0)
    assert room.heard(KVPoll.Success, Blocks(129, 128), 0) is None
    assert isinstance(room.error, RemoteProtocolError)
    assert room.round is not None, "whether it is still being written to nobody knows"


def test_a_reported_failure_and_the_first_reason_stays() -> None:
    room = reception()
    room.ask((3,), 0)
    assert room.heard(KVPoll.Failed, Blocks(None, 0), 0) is None
    assert isinstance(room.error, PeerGone)
    room.fail(Aborted("later"))
    assert isinstance(room.error, PeerGone)


def test_asking_out_of_turn_is_a_mistake() -> None:
    room = reception()
    room.ask((3,), 0)
    with pytest.raises(LocalProtocolError):
        room.ask((4,), 0)
    room.heard(KVPoll.Success, Blocks(1, 1), 0)
    with pytest.raises(LocalProtocolError):
        room.ask((4,), 0)


def test_every_state_that_waits_for_the_peer_has_a_time_out() -> None:
    for rounds, deadline, kind in ((0, 30, PeerGone), (1, 120, LeaseExpired), (2, 10, LeaseExpired)):
        room = reception()
        for _ in range(rounds):
            room.ask((3,), 0)
            if rounds == 2 and room.rounds == 1:
                room.heard(KVPoll.Transferring, Blocks(200, 128), 0)
                assert room.deadline == 10
        assert room.deadline == deadline
        room.tick(deadline - 0.1)
        assert room.error is None
        room.tick(deadline)
        assert isinstance(room.error, kind)


def test_the_rest_must_be_asked_for_in_time() -> None:
    room = reception()
    room.ask((3,), 0)
    room.heard(KVPoll.Transferring, Blocks(200, 128), 5)
    room.tick(15)
    assert isinstance(room.error, LeaseExpired)
    assert "no blocks were free" in room.error.detail


@given(
    st.integers(0, 2000),
    st.lists(st.tuples(st.sampled_from(KVPoll), st.integers(-1, 400), st.integers(1, 3)), max_size=40),
)
def test_whatever_is_said_only_what_is_there_counts(total: int, said: list[tuple[KVPoll, int, int]]) -> None:
    room = reception()
    for status, there, count in said:
        if not room.over and room.round is None:
            room.ask(tuple(range(count)), 0)
        before, asked = room.transferred_tokens, room.round
        shown = None if asked is None else Blocks(None if there < 0 else total, there)
        outcome = room.heard(status, shown, 0)
        if isinstance(outcome, Arrived):
            assert outcome.round is asked
            assert outcome.tokens <= there
            assert room.transferred_tokens == before + outcome.tokens <= total
            assert (status is KVPoll.Success) == (room.transferred_tokens == total)
        else:
            assert room.transferred_tokens == before
        if room.status is KVPoll.Success:
            assert room.transferred_tokens == total == room.total_tokens
