"""Status frames: two or three are read, two are written."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation.wire.statuses import EmbeddingStatus, read_status, write_status
from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

NUMBERS = {b"0": "Failed", b"1": "Bootstrapping", b"2": "WaitingForInput", b"3": "Transferring", b"4": "Success"}


@pytest.mark.parametrize(("number", "name"), NUMBERS.items())
def test_golden_frames(number: bytes, name: str) -> None:
    status = EmbeddingStatus(7, KVPoll[name])
    assert write_status(status) == [b"7", number]
    assert read_status([b"7", number]) == status


@pytest.mark.parametrize(("frame", "rank"), [(b"-1", -1), (b"0", 0), (b"3", 3)])
def test_the_sender_s_rank_is_accepted(frame: bytes, rank: int) -> None:
    status = EmbeddingStatus(7, KVPoll.Success, rank)
    assert read_status([b"7", b"4", frame]) == status
    assert write_status(status) == [b"7", b"4", frame]


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([], "0 frames"),
        ([b"7"], "1 frames"),
        ([b"7", b"4", b"0", b"0"], "4 frames"),
        ([b"x", b"4"], "the room is 'x'"),
        ([b"-7", b"4"], "the room is '-7'"),
        ([b"None", b"4"], "the room is 'None'"),
        ([b"7", b""], "the status is ''"),
        ([b"7", b"5"], "the status is 5; it must be 0 to 4"),
        ([b"7", b"04"], "the status is '04'"),
        ([b"7", b"Success"], "the status is 'Success'"),
        ([b"7", b"4", b"-2"], "rank is '-2'"),
        ([b"7", b"4", b""], "rank is ''"),
        ([b"9" * 5000, b"4"], "the room is '9{40}'…"),
    ],
)
def test_what_is_malformed_is_refused(frames: list[bytes], complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        read_status(frames)


def test_the_room_is_told_when_it_could_be_read() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read_status([b"7", b"5"])
    assert caught.value.room == 7


@pytest.mark.parametrize("status", [EmbeddingStatus(-1, KVPoll.Failed), EmbeddingStatus(1, KVPoll.Failed, -2)])
def test_what_a_peer_would_refuse_is_not_written(status: EmbeddingStatus) -> None:
    with pytest.raises(LocalProtocolError):
        write_status(status)


@given(st.lists(st.binary(max_size=24), max_size=4))
def test_only_our_error_escapes_noise(frames: list[bytes]) -> None:
    with suppress(RemoteProtocolError):
        read_status(frames)
