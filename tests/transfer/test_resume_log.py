"""The lines of resumed transfers, which users search their logs for, on every transport and from the library itself."""

from __future__ import annotations

import logging
import re

import pytest

from embferry import ChunkSink, wait

from .conftest import SECONDS, MakePair, embedding
from .test_transfer import until

PHRASES = ("needs resume for remaining data", "Sent resume transfer request", "completed with resumed transfer")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """Returns the lines of the three kinds, in order."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= level]
    return [line for line in found if any(phrase in line for phrase in PHRASES)]


def test_a_resumed_transfer_is_logged_once_at_the_default_level(
    make_pair: MakePair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "embferry")
    pair = make_pair(num_blocks=1, block_size=8)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, embedding(400))  # 50 times the pool
    wait(receiver, SECONDS)
    needs, sent, completed = lines(caplog)
    assert f"room {receiver.room}: needs resume for remaining data: 8 of 400" in needs
    assert re.search(rf"Sent resume transfer request: room {receiver.room}, sent_tokens 8, allocated_tokens 8", sent)
    assert f"room {receiver.room}: completed with resumed transfer: 400 tokens, 1 initial and 49 resumed" in completed
    requests = [line for line in lines(caplog, logging.DEBUG) if "Sent resume" in line]
    assert [int(re.findall(r"sent_tokens (\d+)", line)[0]) for line in requests] == list(range(8, 400, 8))


def test_an_initial_transfer_is_not_logged_as_resumed(make_pair: MakePair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "embferry")
    pair = make_pair(num_blocks=8, block_size=8)
    pair.sender(7, embedding(60))  # first: a grant for an unknown length is a part of the pool
    receiver = pair.receiver(7)
    receiver.init()
    wait(receiver, SECONDS)
    assert receiver.transfers == 1
    assert lines(caplog, logging.DEBUG) == []


def test_of_several_grants_in_one_turn_only_the_first_is_initial(
    make_pair: MakePair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "embferry")
    pair = make_pair(num_blocks=32, block_size=8)
    receiver = pair.receiver(sink=(sink := ChunkSink()))
    receiver.init()
    pair.sender(receiver.room, embedding(600))  # a quarter of the pool is granted at a time, several times in a turn
    seen = 0
    while seen < 600:
        until(receiver, lambda: sink.peek() is not None)
        chunk = sink.pop()
        assert chunk is not None
        seen += chunk.length
        chunk.release()
    wait(receiver, SECONDS)
    requests = [line for line in lines(caplog, logging.DEBUG) if "Sent resume" in line]
    assert len(requests) == receiver.transfers - 1
    assert not any("sent_tokens 0," in line for line in requests)
