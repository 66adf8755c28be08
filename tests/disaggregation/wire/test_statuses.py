"""Status frames: two or three are read, two are written, and the documentation says so."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation.wire.messages import EmbeddingStatus, read_status, write_status
from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

NUMBERS = {b"0": "Failed", b"1": "Bootstrapping", b"2": "WaitingForInput", b"3": "Transferring", b"4": "Success"}
PAGE = Path(__file__).parents[3] / "docs" / "origin-wire.md"


@pytest.mark.parametrize(("number", "name"), NUMBERS.items())
def test_known_frames_are_read_and_written(number: bytes, name: str) -> None:
    status = EmbeddingStatus(7, KVPoll[name])
    assert write_status(status) == [b"7", number]
    assert read_status([b"7", number]) == status


@pytest.mark.parametrize(("frame", "rank"), [(b"-1", -1), (b"0", 0), (b"3", 3)])
def test_a_third_frame_is_read_and_never_written(frame: bytes, rank: int) -> None:
    status = read_status([b"7", b"4", frame])
    assert status == EmbeddingStatus(7, KVPoll.Success, rank)
    assert write_status(status) == [b"7", b"4"]


def test_the_documentation_states_the_number_of_frames_that_the_codec_reads_and_writes() -> None:
    page = PAGE.read_text()
    (written,) = re.findall(r"^\| frames of a status that is written \| (\d+) \|", page, re.MULTILINE)
    (read,) = re.findall(r"^\| frames of a status that is read \| ([\d or]+) \|", page, re.MULTILINE)
    frames = [b"7", b"4", b"0", b"0"]
    accepted = []
    for count in range(len(frames) + 1):
        with suppress(RemoteProtocolError):
            read_status(frames[:count])
            accepted.append(count)
    assert len(write_status(EmbeddingStatus(7, KVPoll.Success, sender_rank=0))) == int(written)
    assert accepted == [int(count) for count in read.split(" or ")]


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
        ([b"7", b"5"], "the status is 5"),
        ([b"7", b"04"], "the status is '04'"),
        ([b"7", b"Success"], "the status is 'Success'"),
        ([b"7", b"4", b"-2"], "rank is '-2'"),
        ([b"7", b"4", b""], "rank is ''"),
        ([b"9" * 5000, b"4"], "the room is '9{40}'…"),
    ],
)
def test_a_malformed_status_is_refused(frames: list[bytes], complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        read_status(frames)


def test_the_error_has_the_room_if_it_could_be_read() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read_status([b"7", b"5"])
    assert caught.value.room == 7


def test_a_status_that_a_peer_would_refuse_is_not_written() -> None:
    with pytest.raises(LocalProtocolError):
        write_status(EmbeddingStatus(-1, KVPoll.Failed))


@given(st.lists(st.binary(max_size=24), max_size=4))
def test_noise_raises_only_remote_protocol_error(frames: list[bytes]) -> None:
    with suppress(RemoteProtocolError):
        read_status(frames)
