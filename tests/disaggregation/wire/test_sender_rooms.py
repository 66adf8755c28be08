"""The rooms of a sender, message by message."""

from __future__ import annotations

import pytest

from embferry.disaggregation.wire import sender_rooms as sender_rooms_module
from embferry.disaggregation.wire.sender_rooms import (
    Ended,
    Registered,
    SenderRooms,
    WriteBlocks,
)
from embferry.protocol.errors import (
    Aborted,
    CapacityError,
    LeaseExpired,
    LocalProtocolError,
    TransportError,
)
from embferry.protocol.states import KVPoll
from tests.disaggregation.wire.messages import POINTERS, ROOM, SESSION, V3_0, init, register, resume, session_of
from tests.disaggregation.wire.rooms import OTHER_POINTERS, SETTINGS, begun, refusal, registered, report, write


def test_a_single_transfer() -> None:
    rooms = registered()
    room = rooms.open(ROOM, 0)
    assert room.status is KVPoll.Bootstrapping
    assert rooms.receive(init(), 1) == []
    assert room.status is KVPoll.WaitingForInput
    assert rooms.ready(ROOM, 300, 2) == [write((3, 0, 5), 0, 300, aux=True)]
    assert room.status is KVPoll.Transferring
    assert rooms.written(ROOM, SESSION, 3) == [report(KVPoll.Success), Ended(ROOM, None)]
    assert room.status is KVPoll.Success
    assert rooms.next_timeout() is None


def test_spare_blocks_are_not_written() -> None:
    rooms = registered()
    rooms.open(ROOM, 0)
    rooms.receive(init(), 0)
    assert rooms.ready(ROOM, 128, 0) == [write((3,), 0, 128, aux=True)]


def test_the_length_of_an_empty_embedding_is_written() -> None:
    rooms = registered()
    rooms.open(ROOM, 0)
    rooms.receive(init(), 0)
    assert rooms.ready(ROOM, 0, 0) == [write((3,), 0, 0, aux=True)]
    assert rooms.written(ROOM, SESSION, 0)[-1] == Ended(ROOM, None)


def test_the_receiver_may_ask_before_the_room_is_open() -> None:
    rooms = registered()
    assert rooms.receive(init(), 0) == []
    assert rooms.open(ROOM, 1).status is KVPoll.WaitingForInput
    assert rooms.ready(ROOM, 300, 2) == [write((3, 0, 5), 0, 300, aux=True)]


def test_the_embedding_may_be_made_before_the_receiver_asks() -> None:
    rooms = registered()
    rooms.open(ROOM, 0)
    assert rooms.ready(ROOM, 300, 0) == []
    assert rooms.receive(init(), 1) == [write((3, 0, 5), 0, 300, aux=True)]


def test_several_resumed_transfers() -> None:
    rooms = registered()
    rooms.open(ROOM, 0)
    rooms.receive(init(), 0)
    rooms.ready(ROOM, 1000, 0)
    assert rooms.written(ROOM, SESSION, 0) == [report(KVPoll.Transferring)]
    assert rooms.receive(resume(384), 1) == [write((1, 2), 384, 256, aux=False)]
    assert rooms.written(ROOM, SESSION, 1) == [report(KVPoll.Transferring)]
    assert rooms.receive(resume(640, blocks=b"7", allocated=128), 2) == [write((7,), 640, 128, aux=False)]
    assert rooms.written(ROOM, SESSION, 2) == [report(KVPoll.Transferring)]
    assert rooms.receive(resume(768), 3) == [write((1, 2), 768, 232, aux=False)]
    assert rooms.written(ROOM, SESSION, 3) == [report(KVPoll.Success), Ended(ROOM, None)]


def test_a_room_begins_when_every_destination_rank_has_asked() -> None:
    first, second = session_of(0), session_of(1)
    rooms = registered(first, second)
    room = rooms.open(ROOM, 0)
    rooms.ready(ROOM, 640, 0)
    assert rooms.receive(init(session=first, ranks=2), 0) == []
    assert room.status is KVPoll.Bootstrapping
    both = rooms.receive(init(session=second, ranks=2, blocks=b"0,1,2"), 0)
    assert both == [write((3, 0, 5), 0, 384, True, first), write((0, 1, 2), 0, 384, True, second)]
    assert rooms.written(ROOM, second, 0) == []
    assert rooms.written(ROOM, first, 0) == [report(KVPoll.Transferring)] * 2
    assert rooms.receive(resume(session=second, ranks=2), 1) == []
    again = rooms.receive(resume(session=first, ranks=2, blocks=b"6,7"), 1)
    assert again == [write((1, 2), 384, 256, False, second), write((6, 7), 384, 256, False, first)]
    assert rooms.written(ROOM, first, 1) == []
    assert rooms.written(ROOM, second, 1) == [*[report(KVPoll.Success)] * 2, Ended(ROOM, None)]


# A refused message changes nothing


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (init(session="10.0.0.9:1"), "not registered"),
        (init(), "asked for this room already"),
        (init(session=session_of(1)), "every destination rank of the room has asked already"),
        (resume(512), "sent_tokens is 512, but 384 have been sent"),
        (resume(128), "sent_tokens is 128, but 384 have been sent"),
        (resume(ranks=2), "required_dst_info_num is 2, but the room has 1 ranks"),
        (resume(session=session_of(1)), "no destination of this room"),
        (resume(room=8), "the room is unknown, or over"),
        (resume(blocks=b"1,9"), "a block index is 9"),
        (resume(blocks=b"1,1"), "stands twice"),
        (resume(allocated=255), "2 blocks of 128 tokens are 256"),
        ([b"nonsense"], "1 frames"),
        (register(), "registered already, with the same buffers"),
        (register(pointers=OTHER_POINTERS), "with other buffers that a transfer uses"),
    ],
)
def test_a_refused_message_does_not_disturb_the_transfer(message: list[bytes], reason: str) -> None:
    rooms = begun()
    rooms.receive(register(session_of(1)), 0)
    before = rooms.next_timeout()
    assert reason in refusal(rooms, message, 1)
    assert rooms.next_timeout() == before
    assert rooms.receive(resume(384, blocks=b"0,1,2,3,4", allocated=640), 2) == [
        write((0, 1, 2, 3, 4), 384, 616, False)
    ]
    assert rooms.written(ROOM, SESSION, 2)[0] == report(KVPoll.Success)


def test_a_resume_while_the_earlier_transfer_is_written_is_refused() -> None:
    rooms = begun()
    rooms.receive(resume(), 0)
    assert "still being written" in refusal(rooms, resume())


def test_a_repeated_resume_of_one_rank_does_not_count_for_the_other() -> None:
    rooms = registered(session_of(0), session_of(1))
    rooms.open(ROOM, 0)
    rooms.ready(ROOM, 640, 0)
    for rank in (0, 1):
        rooms.receive(init(session=session_of(rank), ranks=2), 0)
    for rank in (0, 1):
        rooms.written(ROOM, session_of(rank), 0)
    mine = resume(session=session_of(0), ranks=2)
    assert rooms.receive(mine, 1) == []
    assert "asked for this resume already" in refusal(rooms, mine, 1)
    uneven = resume(session=session_of(1), ranks=2, blocks=b"1", allocated=128)
    assert "allocated_tokens is 128, but another rank of the room sent 256" in refusal(rooms, uneven, 1)
    assert len(rooms.receive(resume(session=session_of(1), ranks=2), 1)) == 2


def test_ranks_that_disagree_about_their_number_are_refused() -> None:
    rooms = registered(session_of(0), session_of(1))
    rooms.receive(init(session=session_of(0), ranks=2), 0)
    reason = refusal(rooms, init(session=session_of(1), ranks=3))
    assert "required_dst_info_num is 3, but another rank of the room sent 2" in reason


def test_a_rank_too_many_is_refused_before_the_embedding_is_made() -> None:
    rooms = registered(session_of(0), session_of(1))
    rooms.open(ROOM, 0)
    rooms.receive(init(session=session_of(0)), 0)
    reason = refusal(rooms, init(session=session_of(1)))
    assert reason == "every destination rank of the room has asked already"
    assert len(rooms.ready(ROOM, 300, 0)) == 1


def test_a_resume_before_anything_was_transferred_is_refused() -> None:
    rooms = registered()
    rooms.receive(init(), 0)
    assert "nothing of the room has been transferred" in refusal(rooms, resume())


def ended(how: str) -> SenderRooms:
    """Returns rooms of which one is over."""
    if how == "success":
        return begun(total_tokens=300)
    rooms = begun() if how == "failure after the first transfer" else registered()
    if how == "failure before it was asked for":
        rooms.open(ROOM, 0)
    rooms.abort(ROOM, Aborted("asked for"))
    return rooms


@pytest.mark.parametrize("how", ["success", "failure after the first transfer", "failure before it was asked for"])
@pytest.mark.parametrize("first", ["the receiver asks", "this side opens"])
def test_a_room_that_is_over_can_be_used_again(how: str, first: str) -> None:
    rooms = ended(how)
    assert refusal(rooms, resume(), 1) == "the room is unknown, or over"
    if first == "this side opens":
        rooms.open(ROOM, 2)
    assert rooms.receive(init(blocks=b"6", allocated=128), 3) == []
    if first == "the receiver asks":
        rooms.open(ROOM, 4)
    assert rooms.ready(ROOM, 100, 5) == [write((6,), 0, 100, aux=True)]
    assert rooms.written(ROOM, SESSION, 6) == [report(KVPoll.Success), Ended(ROOM, None)]


def test_the_receiver_of_a_room_that_is_not_opened_again_is_told_in_time() -> None:
    rooms = ended("success")
    rooms.receive(init(), 7)
    assert ended_by_time(rooms)[0] == 7 + SETTINGS.bootstrap_timeout


# Registrations


def test_other_buffers_wait_until_no_transfer_uses_the_earlier_ones() -> None:
    rooms = begun()
    assert "that a transfer uses" in refusal(rooms, register(pointers=OTHER_POINTERS))
    assert "has registered other buffers" in refusal(rooms, init(room=8))
    assert rooms.receive(resume(384, blocks=b"0,1,2,3,4", allocated=640), 0)[0] == write(
        (0, 1, 2, 3, 4), 384, 616, aux=False
    )
    taken = [report(KVPoll.Success), Ended(ROOM, None), Registered(SESSION, OTHER_POINTERS)]
    assert rooms.written(ROOM, SESSION, 0) == taken
    rooms.open(8, 1)
    rooms.ready(8, 10, 1)
    assert rooms.receive(init(room=8), 1) == [WriteBlocks(8, SESSION, OTHER_POINTERS, (3,), 0, 10, True)]


def test_other_buffers_wait_for_every_transfer_of_the_session() -> None:
    rooms = begun()
    rooms.receive(init(room=8), 0)
    assert "that a transfer uses" in refusal(rooms, register(pointers=OTHER_POINTERS))
    assert Registered(SESSION, OTHER_POINTERS) not in rooms.abort(ROOM, Aborted("enough"))
    assert rooms.abort(8, Aborted("enough"))[-1] == Registered(SESSION, OTHER_POINTERS)


def test_registering_the_same_buffers_again_withdraws_the_waiting_registration() -> None:
    rooms = begun()
    assert "that a transfer uses" in refusal(rooms, register(pointers=OTHER_POINTERS))
    assert "with the same buffers" in refusal(rooms, register())
    assert rooms.receive(init(room=8), 0) == []
    assert Registered(SESSION, OTHER_POINTERS) not in rooms.abort(ROOM, Aborted("enough"))


def test_an_idle_session_may_register_other_buffers() -> None:
    rooms = registered()
    assert rooms.receive(register(pointers=OTHER_POINTERS), 0) == [Registered(SESSION, OTHER_POINTERS)]


def test_the_oldest_idle_registration_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_rooms_module, "MAX_SESSIONS", 2)
    rooms = registered(session_of(0), session_of(1))
    rooms.receive(init(session=session_of(0)), 0)
    assert rooms.receive(register(session_of(2)), 0) == [Registered(session_of(2), POINTERS)]
    assert "not registered" in refusal(rooms, init(room=8, session=session_of(1)))
    rooms.receive(init(room=8, session=session_of(2)), 0)
    assert "2 sessions are registered and in use" in refusal(rooms, register(session_of(3)))


def test_rooms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_rooms_module, "MAX_ROOMS", 1)
    rooms = registered()
    rooms.receive(init(), 0)
    assert refusal(rooms, init(room=8)) == "1 rooms are open"
    with pytest.raises(CapacityError):
        rooms.open(8, 0)
    rooms.abort(ROOM, Aborted("enough"))
    rooms.open(8, 0)
    rooms.abort(8, Aborted("enough"))


# Failures and time


def test_a_failed_write_fails_its_room_when_the_others_have_ended_and_leaves_the_session_usable() -> None:
    rooms = registered(session_of(0), session_of(1))
    rooms.open(ROOM, 0)
    rooms.ready(ROOM, 640, 0)
    for rank in (0, 1):
        rooms.receive(init(session=session_of(rank), ranks=2), 0)
    assert rooms.written(ROOM, session_of(1), 0, "the link broke") == []
    *reports, ended = rooms.written(ROOM, session_of(0), 0)
    assert reports == [report(KVPoll.Failed)] * 2
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, TransportError)
    assert ended.error.detail == "the link broke"
    assert rooms.receive(init(room=8, session=session_of(1)), 0) == []


def test_an_abort_waits_for_the_writes() -> None:
    rooms = begun()
    rooms.receive(resume(), 0)
    gone = Aborted("the client has gone")
    assert rooms.abort(ROOM, gone) == []
    assert rooms.written(ROOM, SESSION, 0) == [report(KVPoll.Failed), Ended(ROOM, gone)]
    assert rooms.abort(ROOM, Aborted("again")) == []


def ended_by_time(rooms: SenderRooms) -> tuple[float, str]:
    """Returns the time at which the room ends if nothing happens any more, and the reason."""
    due = rooms.next_timeout()
    assert due is not None
    assert rooms.tick(due - 0.001) == []
    commands = rooms.tick(due)
    ended = commands[-1]
    assert isinstance(ended, Ended)
    assert all(command == report(KVPoll.Failed) for command in commands[:-1])
    assert isinstance(ended.error, LeaseExpired)
    assert (rooms.tick(due), rooms.next_timeout()) == ([], None)
    return due, ended.error.detail


def test_every_state_that_waits_for_a_peer_has_a_time_out() -> None:
    unasked, unopened, unmade = registered(), registered(), registered()
    unasked.open(ROOM, 5)
    assert ended_by_time(unasked) == (35, "not every destination rank has asked in time")
    unopened.receive(init(), 6)
    because = "the receiver asked, but there was no such request on the encode side in time"
    assert ended_by_time(unopened) == (36, because)
    unmade.open(ROOM, 5)
    unmade.receive(init(), 7)
    assert ended_by_time(unmade) == (127, "the embedding was not made in time")
    assert ended_by_time(begun()) == (10, "not every destination rank has asked for the rest in time")


def test_a_write_has_no_time_out() -> None:
    rooms = begun()
    rooms.receive(resume(), 0)
    assert rooms.next_timeout() is None
    assert rooms.tick(1e9) == []
    assert rooms.written(ROOM, SESSION, 1e9) == [report(KVPoll.Transferring)]


def test_wrong_calls_raise_an_error() -> None:
    with pytest.raises(LocalProtocolError, match="generation"):
        SenderRooms(V3_0, SETTINGS)
    rooms = begun()
    with pytest.raises(LocalProtocolError, match="open already"):
        rooms.open(ROOM, 0)
    with pytest.raises(LocalProtocolError, match="not waiting for its embedding"):
        rooms.ready(ROOM, 5, 0)
    with pytest.raises(LocalProtocolError, match="not waiting for its embedding"):
        rooms.ready(8, 5, 0)
    with pytest.raises(LocalProtocolError, match="no write"):
        rooms.written(ROOM, SESSION, 0)
