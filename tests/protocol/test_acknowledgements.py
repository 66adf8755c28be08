"""Acknowledgements of one sender's content have no effect on the grants of another's."""

from __future__ import annotations

import pytest

from embferry.protocol.messages import Grant, Offer, Open, Progress, decode
from embferry.protocol.states import Phase

from .ends import Content
from .quiescence import quiesce
from .script import ROOM, Script

FIRST, SECOND = "encode 0", "other"


def away_and_back(*, late: type | None) -> Script:
    """The receiver goes on with a worker that has another content, then with the first one again.

    A message of kind ``late``, which the first sender was sent before, reaches it after the second `open`.
    """
    s = Script(total=8, num_blocks=8)
    s.handshake()
    s.arrives(Grant)
    s.chunk_arrives()
    s.chunk_arrives()
    if late is not None:
        s.keep_copy(late)
    s.loses(Progress)
    first = s.encoder
    s.start_encoder(ROOM, Content(2, 8), SECOND).produce(8)
    s.redirect(s.receiver, SECOND)
    s.handshake()
    s.redirect(s.receiver, FIRST)
    s.arrives(Open)
    if late is not None:
        s.copy_arrives()
    s.newest_arrives(Offer)
    assert s.receiver.machine.peer == first.machine.session
    return s


@pytest.mark.parametrize("late", [None, Progress])
def test_a_late_acknowledgement_of_an_earlier_content_stalls_nothing(late: type | None) -> None:
    s = away_and_back(late=late)
    begun = s.now
    quiesce(s)
    assert s.receiver.machine.phase is Phase.SUCCESS, s.receiver.machine.error
    assert s.receiver.machine.ended_at < begun + 1
    assert s.receiver.machine.content_digest == Content(1, 8).digest


@pytest.mark.parametrize("order", ["late", "in order"])
def test_a_sender_without_a_length_is_told_of_no_token_of_another_content(order: str) -> None:
    """The heartbeat of a receiver that does not know yet whether the content is the same acknowledges nothing."""
    s = Script(total=8, num_blocks=8)
    s.handshake()
    s.arrives(Grant)
    s.chunk_arrives()
    s.chunk_arrives()
    s.consume_first()
    other = s.start_encoder(ROOM, Content(2, 8), SECOND)
    s.receiver.machine.committed = False
    s.redirect(s.receiver, SECOND)
    s.loses(Progress)
    s.handshake()
    s.tick(s.settings.retry_limit)
    heartbeats = [decode(s.network.packets[at].data).body for at in s.where(Progress)]
    assert heartbeats
    assert {body.transferred_tokens for body in heartbeats if isinstance(body, Progress)} == {0}
    if order == "in order":
        s.arrives(Progress)
    other.produce(8)
    s.run()
    s.newest_arrives(Offer)
    while s.where(Progress):
        s.arrives(Progress)
    quiesce(s)
    assert s.receiver.machine.phase is Phase.SUCCESS, s.receiver.machine.error
    assert s.receiver.machine.content_digest == Content(2, 8).digest
