"""The last events of an end, for the log of a bug."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.history import KEPT, History

from .builders import SIZE, a_grant, an_open, offered, opened, report_chunk, to_sender
from .test_messages import EXAMPLES


def test_a_history_names_messages_and_calls_in_their_order() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    report_chunk(receiver, 1, 0, SIZE)
    assert receiver.history.lines() == [
        "sent Open (1, 0) to 0",
        "received Offer (1, 8, 'tcp') at 0",
        "called grant (1, 0, 8, 0.0)",
        "sent Grant (1, 0, 8, 1) to 200",
        "received Written (1, 0, 1) at 0",
        "called verified_chunk (1, 0, True, 0.0)",
        "sent Progress (4, 1) to 200",
    ]
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)), 2.5)
    sender.write_done(100, 1, 0, 4, b"checksum")
    assert sender.history.lines()[-5:] == [
        "received Open (1, 0) at 0",
        "sent Offer (1, 8, 'shm') to 100",
        "received Grant (1, 0, 8, 0) at 2.5",
        "called write_done (1, 0, 4)",
        "sent Written (1, 0, 1) to 100",
    ]


def test_a_history_is_bounded() -> None:
    sender = opened(8)
    for _ in range(2 * KEPT):
        to_sender(sender, an_open(), target=0)
    assert len(sender.history) == len(sender.history.lines()) == KEPT


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: type(body).__name__)
def test_every_message_has_a_line(body: m.Body) -> None:
    history = History()
    history.received(body, 1.25)
    history.sent(body, 5)
    received, sent = history.lines()
    assert received.startswith(f"received {type(body).__name__} ")
    assert received.endswith(" at 1.25")
    assert sent.endswith(" to 5")
