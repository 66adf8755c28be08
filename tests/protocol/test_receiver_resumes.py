"""The receiver's state machine when its sender is lost, restarted or not found."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from embferry.protocol import messages as m
from embferry.protocol.announcements import MAX_SENDERS
from embferry.protocol.commands import CloseBlocks, Release, Restart, Revoke
from embferry.protocol.errors import Aborted, IntegrityError, PeerGone, RemoteProtocolError
from embferry.protocol.states import KVPoll, Phase

from .builders import (
    ENCODE,
    ROOM,
    an_offer,
    new_receiver,
    offered,
    other_commands,
    report_chunk,
    sent_messages,
    to_receiver,
    written,
)


def test_a_redirect_before_the_first_answer_starts_another_generation() -> None:
    receiver = new_receiver()
    to_receiver(receiver, m.Unknown(ROOM, 0), source=0)
    receiver.take_commands()
    receiver.peer_lost(1.0)
    assert [body.generation for body in sent_messages(receiver) if isinstance(body, m.Open)] == [2]
    to_receiver(receiver, m.Abort(ROOM, "aborted", "asked for", 1), 1.0)
    to_receiver(receiver, an_offer(4, generation=1), 1.0)
    assert (receiver.phase, receiver.peer) == (Phase.BOOTSTRAPPING, 0)


def test_another_sender_resumes_the_same_embedding() -> None:
    receiver = offered(12)
    receiver.grant((0, 1, 2), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    receiver.committed = True
    receiver.take_commands()
    to_receiver(receiver, m.Unknown(ROOM, ENCODE))
    assert receiver.phase is Phase.RESUMING
    commands = receiver.take_commands()
    assert commands[0] == Revoke(1)
    to_receiver(receiver, an_offer(12, generation=1))  # a late copy of the first sender's offer
    assert receiver.peer == 0
    to_receiver(receiver, an_offer(-1, generation=2), source=ENCODE + 1)
    assert receiver.wanted(0.0) is None  # it may have another embedding: nothing is requested yet
    to_receiver(receiver, an_offer(12, generation=2), source=ENCODE + 1)
    assert receiver.wanted(0.0) == (4, 8)
    receiver.grant((3, 4), 2, 0.0)
    receiver.expire(0.1)
    assert m.Drain(ROOM, (1,)) not in sent_messages(receiver)  # the second sender cannot know of the first one's writes
    to_receiver(receiver, m.Drained(ROOM, (1,)), source=ENCODE + 1)
    assert 1 in receiver.ledger.grants
    receiver.revoked(1)
    assert other_commands(receiver) == [CloseBlocks(1, (1, 2)), Release((1, 2))]
    for offset in (4, 8):
        to_receiver(receiver, written(2, offset, 4), source=ENCODE + 1)
        receiver.verified_chunk(2, offset, matches=True, now=0.0)
    assert receiver.poll() is KVPoll.Success


def test_another_embedding_restarts_if_no_token_was_used() -> None:
    receiver = offered(12)
    receiver.grant((0, 1, 2), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    to_receiver(receiver, written(1, 4, 4))
    receiver.take_commands()
    receiver.peer_lost(0.0)
    assert receiver.take_commands()[0] == Revoke(1)
    to_receiver(receiver, an_offer(12, generation=2, digest=b"another"), source=ENCODE + 1)
    assert receiver.take_commands() == [Restart(), Release((0,))]
    assert (receiver.transferred_tokens, receiver.wanted(0.0)) == (0, (0, 12))
    receiver.verified_chunk(1, 4, matches=True, now=0.0)  # of the first embedding
    assert other_commands(receiver) == [Release((1,))]
    receiver.revoked(1)
    assert other_commands(receiver) == [CloseBlocks(1, (2,)), Release((2,))]


@pytest.mark.parametrize(
    "changes",
    [{"total_tokens": 11}, {"total_tokens": 13}, {"total_tokens": 0}, {"content_digest": b"Content"}, {"aux": (12, 4)}],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_a_session_that_changes_its_announcement_breaks_the_protocol(changes: dict[str, Any], reopened: bool) -> None:
    receiver = offered(12)
    if reopened:
        receiver.peer_lost(0.0)
    first = an_offer(12, generation=receiver.generation)
    for _ in range(2):
        to_receiver(receiver, first)  # repeated: no difference
        to_receiver(receiver, an_offer(-1, generation=receiver.generation))  # late
    assert receiver.error is None
    to_receiver(receiver, msgspec.structs.replace(first, **changes))
    assert isinstance(receiver.error, RemoteProtocolError)
    assert (receiver.total_tokens, receiver.poll()) == (12, KVPoll.Failed)
    assert isinstance(sent_messages(receiver)[-1], m.Abort)


def test_the_announcements_that_a_receiver_remembers_are_bounded() -> None:
    receiver = new_receiver(max_peer_losses=1000)
    for session in range(1, MAX_SENDERS + 10):
        to_receiver(receiver, an_offer(12, generation=receiver.generation), source=session)
        receiver.peer_lost(0.0)
    assert len(receiver.announcements) == MAX_SENDERS


def test_another_embedding_fails_if_tokens_were_used() -> None:
    receiver = offered(12)
    receiver.grant((0, 1, 2), 1, 0.0)
    report_chunk(receiver, 1, 0, 4)
    receiver.committed = True
    receiver.peer_lost(0.0)
    to_receiver(receiver, an_offer(12, generation=2, digest=b"another"), source=ENCODE + 1)
    assert isinstance(receiver.error, IntegrityError)
    assert receiver.error.retryable
    assert isinstance(sent_messages(receiver)[-1], m.Abort)


def test_tokens_verified_without_a_peer_count() -> None:
    receiver = offered(4)
    receiver.grant((0,), 1, 0.0)
    to_receiver(receiver, written(1, 0, 4))
    receiver.take_commands()
    receiver.peer_lost(0.0)
    assert receiver.phase is Phase.BOOTSTRAPPING
    receiver.verified_chunk(1, 0, matches=True, now=0.0)
    assert receiver.poll() is KVPoll.Success
    assert [type(body) for body in sent_messages(receiver)] == [m.Open]
    to_receiver(receiver, an_offer(4, generation=2, digest=b"another"), source=ENCODE + 1)
    assert sent_messages(receiver) == []
    to_receiver(receiver, an_offer(4, generation=2), source=ENCODE + 1)  # it waits for this confirmation
    assert sent_messages(receiver) == [m.Confirm(ROOM, 4)]
    to_receiver(receiver, an_offer(4, generation=2), source=ENCODE + 1)
    assert sent_messages(receiver) == []


def test_a_sender_lost_after_an_abort_is_revoked() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    receiver.abort(Aborted("asked for", room=ROOM), 0.0)
    receiver.take_commands()
    to_receiver(receiver, m.Unknown(ROOM, ENCODE))
    assert other_commands(receiver) == [Revoke(1)]
    receiver.revoked(1)
    assert receiver.settled(0.0)


def test_losing_the_peer_too_often_in_a_row_fails_the_transfer() -> None:
    receiver = new_receiver(max_peer_losses=2)
    for generation in (1, 2, 3):
        to_receiver(receiver, an_offer(8, generation))
        receiver.peer_lost(0.0)
    assert isinstance(receiver.error, PeerGone)
    assert "3 times" in receiver.error.detail
