"""Requests of a receiver: the frames of the format, and the frames that are refused."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.disaggregation.wire.messages import (
    MAX_DESTINATIONS,
    MAX_ROOM,
    MAX_TOKENS,
    EmbeddingArgsRegisterInfo,
    Generation,
    OriginWire,
    Request,
    TransferEmbeddingChunk,
    TransferEmbeddingInfo,
    read,
    write,
)
from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from tests.disaggregation.wire.messages import POINTERS, ROOM, SESSION, V3_0, WIRE, init, register, resume

HEAD = (ROOM, "10.0.0.2", 41007, SESSION)
FIVE = OriginWire(num_blocks=8, block_size=128, num_buffers=5)
REGISTERED = EmbeddingArgsRegisterInfo("None", "10.0.0.2", 41007, SESSION, POINTERS)
INITIAL = TransferEmbeddingInfo(*HEAD, (3, 0, 5), 1, 0, 384)
RESUMED = TransferEmbeddingInfo(*HEAD, (1, 2), 1, 384, 256)

KNOWN = [
    (WIRE, register(), REGISTERED),
    (V3_0, register(), REGISTERED),
    (WIRE, init(), INITIAL),
    (WIRE, resume(), RESUMED),
    (V3_0, init(blocks=b"3", allocated=0), TransferEmbeddingInfo(*HEAD, (3,), 1, 0)),
    (V3_0, init(blocks=b"7", allocated=1000), TransferEmbeddingInfo(*HEAD, (7,), 1, 1000)),
]


@pytest.mark.parametrize(("wire", "message", "meaning"), KNOWN)
def test_known_frames_are_read_and_written(wire: OriginWire, message: list[bytes], meaning: Request) -> None:
    assert read(message, wire) == meaning
    assert write(meaning, wire) == message


def test_a_resume_is_written_as_these_bytes() -> None:
    assert write(RESUMED, WIRE) == [
        b"4611686018427387905", b"10.0.0.2", b"41007", b"10.0.0.2:15001", b"1,2", b"1", b"384", b"256",
    ]  # fmt: skip
    assert write(REGISTERED, WIRE)[4] == b"".join(struct.pack("Q", pointer) for pointer in POINTERS)


def test_a_resume_is_told_from_an_initial_request() -> None:
    assert [read(message, wire).is_resume for wire, message, _ in KNOWN[2:]] == [False, True, False, True]  # type: ignore[union-attr]


def test_the_same_seven_frames_mean_another_request_in_each_generation() -> None:
    message = init(blocks=b"3", allocated=128)
    later, earlier = read(message, WIRE), read(message, V3_0)
    assert isinstance(later, TransferEmbeddingInfo)
    assert isinstance(earlier, TransferEmbeddingInfo)
    assert (later.sent_tokens, later.allocated_tokens) == (0, 128)
    assert (earlier.sent_tokens, earlier.allocated_tokens) == (128, 0)


def test_frames_after_the_eighth_are_ignored() -> None:
    assert read([*resume(), b"\xff", b""], WIRE) == RESUMED


def test_a_registration_may_have_five_pointers_and_an_ipv6_host() -> None:
    message = register("[fd00::1]:15001", (*POINTERS, 1 << 61))
    message[1] = b"fd00::1"
    info = read(message, WIRE)
    assert isinstance(info, EmbeddingArgsRegisterInfo)
    assert info.dst_embedding_ptrs[4] == 1 << 61
    assert (info.endpoint, info.mooncake_session_id) == ("fd00::1", "[fd00::1]:15001")


def test_chunk_info_is_offset_and_length() -> None:
    assert TransferEmbeddingChunk(ROOM, (0, 1), True, 1000, 384).chunk_info == (384, 616)


def replaced(message: list[bytes], place: int, frame: bytes) -> list[bytes]:
    return [*message[:place], frame, *message[place + 1 :]]


NOT_NUMBERS = [b"", b" 1", b"1 ", b"+1", b"-1", b"01", b"1.0", b"1e1", b"0x1", b"1_0", b"\xd9\xa1", b"a", b"\x00"]


@pytest.mark.parametrize("junk", NOT_NUMBERS)
@pytest.mark.parametrize("place", [0, 2, 4, 5, 6, 7])
def test_a_frame_that_is_no_number_is_refused(place: int, junk: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"must be|is empty"):
        read(replaced(resume(), place, junk), WIRE)


@pytest.mark.parametrize("place", [0, 2, 4, 5, 6, 7])
def test_huge_numbers_are_refused_before_they_are_converted(place: int) -> None:
    with pytest.raises(RemoteProtocolError, match=r"must be|there are 8 blocks in all"):
        read(replaced(resume(), place, b"9" * 100_000), WIRE)


@pytest.mark.parametrize(
    ("wire", "message", "complaint"),
    [
        (WIRE, [], "0 frames"),
        (WIRE, [b"1"], "1 frames"),
        (WIRE, init()[:6], "6 frames; in generation blocks it has 7, or 8 and more"),
        (WIRE, [*resume(), *[b""] * 25], "33 frames"),
        (V3_0, resume(), "8 frames; in generation v3.0 it has 7"),
        (WIRE, register()[:4], "registration of 4 frames"),
        (WIRE, [*register(), b""], "registration of 6 frames"),
        (WIRE, replaced(init(), 0, b"none"), "the room is 'none'"),
        (WIRE, replaced(init(), 0, str(1 << 63).encode()), "the room is 9223372036854775808; it must be 0 to"),
        (WIRE, replaced(init(), 1, b""), "host is ''"),
        (WIRE, replaced(init(), 1, b"a b"), "host name or address"),
        (WIRE, replaced(init(), 1, b"a" * 256), "host is 'a{40}'…"),
        (WIRE, replaced(init(), 2, b"0"), "port is 0; it must be 1 to 65535"),
        (WIRE, replaced(init(), 2, b"65536"), "port is 65536"),
        (WIRE, replaced(init(), 3, b"10.0.0.2"), "session id is '10.0.0.2'; it must be host:port"),
        (WIRE, replaced(init(), 3, b":15001"), "session's host"),
        (WIRE, replaced(init(), 3, b"10.0.0.2:"), "session's port"),
        (WIRE, init(blocks=b""), "the list of blocks is empty"),
        (WIRE, init(blocks=b","), "a block index is ''"),
        (WIRE, init(blocks=b"1,2,"), "a block index is ''"),
        (WIRE, init(blocks=b"1;2;3"), "a block index is '1;2;3'"),
        (WIRE, init(blocks=b"1,-2,3"), "a block index is '-2'"),
        (WIRE, init(blocks=b"1,8,3"), "a block index is 8; it must be 0 to 7"),
        (WIRE, init(blocks=b"1,2,1"), "stands twice"),
        (WIRE, init(blocks=b"0,1,2,3,4,5,6,7,0", allocated=1152), "there are 8 blocks in all"),
        (WIRE, init(allocated=0), "allocated_tokens is 0; it must be 1"),
        (WIRE, init(allocated=383), "3 blocks of 128 tokens are 384"),
        (WIRE, resume(allocated=128), "2 blocks of 128 tokens are 256"),
        (WIRE, init(ranks=0), "required_dst_info_num is 0"),
        (WIRE, init(ranks=4097), "required_dst_info_num is 4097; it must be 1 to 4096"),
        (WIRE, resume(sent=0), "sent_tokens is 0; it must be 1"),
        (WIRE, resume(sent=130), "a resume starts at a multiple of 128"),
        (WIRE, resume(sent=1 << 40), "sent_tokens is 1099511627776"),
        (V3_0, init(blocks=b"8", allocated=0), "buffer index is '?8"),
        (V3_0, init(blocks=b"1,2", allocated=0), "buffer index is '1,2'"),
        (V3_0, init(blocks=b"1", allocated=-1), "sent_tokens is '-1'"),
        (WIRE, replaced(register(), 4, b""), "base pointers of 0 bytes"),
        (WIRE, replaced(register(), 4, b"x" * 31), "base pointers of 31 bytes"),
        (WIRE, register(pointers=POINTERS[:3]), "base pointers of 24 bytes; they must be 4 or 5 of 8 bytes"),
        (WIRE, register(pointers=POINTERS + POINTERS[:2]), "base pointers of 48 bytes"),
        (WIRE, register(pointers=(*POINTERS[:3], 0)), "a base pointer is 0"),
        (
            WIRE,
            register(pointers=(*POINTERS[:3], 1 << 62)),
            "a base pointer is 0x4000000000000000, which is no address",
        ),
        (FIVE, register(), "4 base pointers, but embeddings here lie in 5 buffers"),
        (WIRE, replaced(init(), 4, b"1," * (1 << 20)), "a frame of 2097152 bytes; the limit is 1048576"),
    ],
)
def test_a_malformed_message_is_refused(wire: OriginWire, message: list[bytes], complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        read(message, wire)


def test_the_error_has_the_room_if_it_could_be_read() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read(init(allocated=1), WIRE)
    assert caught.value.room == ROOM


def test_a_registration_has_none_as_its_first_frame() -> None:
    with pytest.raises(RemoteProtocolError, match="whose first frame is '7', not None"):
        EmbeddingArgsRegisterInfo.from_zmq(replaced(register(), 0, b"7"), WIRE)


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (TransferEmbeddingInfo(*HEAD, (), 1, 0, 0), WIRE),
        (TransferEmbeddingInfo(*HEAD, (1,), 1, 0, 127), WIRE),
        (TransferEmbeddingInfo(*HEAD, (1,), 1, -128, 128), WIRE),
        (TransferEmbeddingInfo(-1, *HEAD[1:], (1,), 1, 0, 128), WIRE),
        (TransferEmbeddingInfo(10**5000, *HEAD[1:], (1,), 1, 0, 128), WIRE),
        (TransferEmbeddingInfo(ROOM, "hôte", *HEAD[2:], (1,), 1, 0, 128), WIRE),
        (TransferEmbeddingInfo(*HEAD, (1,), 1, 0, 128), V3_0),
        (TransferEmbeddingInfo(*HEAD, (1, 2), 1, 0), V3_0),
        (EmbeddingArgsRegisterInfo("None", *HEAD[1:], (1, 2, 3)), WIRE),
        (EmbeddingArgsRegisterInfo("None", *HEAD[1:], (1, 2, 3, 1 << 64)), WIRE),
        (EmbeddingArgsRegisterInfo("7", *HEAD[1:], POINTERS), WIRE),
    ],
)
def test_a_message_that_a_peer_would_refuse_is_not_written(message: Request, wire: OriginWire) -> None:
    with pytest.raises(LocalProtocolError):
        write(message, wire)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0)])
def test_a_pool_without_blocks_or_tokens_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(LocalProtocolError, match="hold nothing"):
        OriginWire(num_blocks, block_size)


# Round trips and noise

HOSTS = st.from_regex(r"[0-9A-Za-z.-]{1,40}", fullmatch=True) | st.ip_addresses().map(str)
PORTS = st.integers(1, 65535)
ADDRESSES = st.tuples(HOSTS, PORTS, st.builds("{}:{}".format, HOSTS, PORTS))


@st.composite
def wires(draw: st.DrawFn) -> OriginWire:
    sizes = st.integers(1, 1000), st.integers(1, 256), st.sampled_from(Generation)
    return OriginWire(*(draw(size) for size in sizes))


@st.composite
def requests(draw: st.DrawFn, wire: OriginWire) -> Request:
    host, port, session = draw(ADDRESSES)
    if draw(st.booleans()):
        pointers = draw(st.lists(st.integers(1, (1 << 62) - 1), min_size=4, max_size=5))
        return EmbeddingArgsRegisterInfo("None", host, port, session, tuple(pointers))
    head = (draw(st.integers(0, MAX_ROOM)), host, port, session)
    ranks = draw(st.integers(1, MAX_DESTINATIONS))
    if wire.generation is Generation.V3_0:
        index = draw(st.integers(0, wire.num_blocks - 1))
        return TransferEmbeddingInfo(*head, (index,), ranks, draw(st.integers(0, MAX_TOKENS)))
    blocks = draw(st.lists(st.integers(0, wire.num_blocks - 1), min_size=1, max_size=20, unique=True))
    sent = draw(st.integers(0, 1 << 20)) * wire.block_size
    return TransferEmbeddingInfo(*head, tuple(blocks), ranks, sent, len(blocks) * wire.block_size)


@given(wires(), st.data())
def test_every_message_is_read_as_it_was_written(wire: OriginWire, data: st.DataObject) -> None:
    message = data.draw(requests(wire))
    assert read(write(message, wire), wire) == message


NOISE = st.lists(st.binary(max_size=24) | st.integers(-(1 << 70), 1 << 70).map(lambda n: str(n).encode()), max_size=34)


@given(NOISE, st.sampled_from([WIRE, V3_0]), st.booleans())
def test_noise_raises_only_remote_protocol_error(noise: list[bytes], wire: OriginWire, registers: bool) -> None:
    with suppress(RemoteProtocolError):
        read([b"None", *noise] if registers else noise, wire)


@given(st.sampled_from(KNOWN), st.data())
def test_changed_frames_are_refused_or_written_back_unchanged(known: tuple[Any, ...], data: st.DataObject) -> None:
    wire, message, _ = known
    place = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message[place])
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    frames_now = replaced(message, place, bytes(changed))
    try:
        info = read(frames_now, wire)
    except RemoteProtocolError:
        return
    assert write(info, wire) == frames_now
