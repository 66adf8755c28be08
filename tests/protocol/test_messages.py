"""The messages on the wire, and the rejection of malformed ones."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol import messages as m
from embferry.protocol.errors import RemoteProtocolError, TransportError, VersionMismatch
from embferry.protocol.layout import Field, Geometry, Layout

GEOMETRY = Geometry(Layout((Field("input_embeddings", "bfloat16", 8),)), 16, 4)
EXAMPLES: tuple[m.Body, ...] = (
    m.Open(
        7, 1, (1, 1), GEOMETRY, "language", (m.TransportAddress("tcp", b"handle"), m.TransportAddress("shm", b"")), 12
    ),
    m.Grant(7, 3, 12, 15, ((2, 2), (9, 2)), 2, "tcp"),
    m.Progress(7, 12, 3),
    m.Drain(7, (3, 4)),
    m.Confirm(7, 27),
    m.Offer(7, 1, 1, "tcp", 27, b"digest", (27, -5)),
    m.Pending(7, 3),
    m.Written(7, 3, (m.Chunk(12, 8, b"checksum"), m.Chunk(20, 7, b"CHECKSUM"))),
    m.WriteFailed(7, 3, 12, 8, "transport_error", "the link broke", True),
    m.Drained(7, (3,)),
    m.Closed(7),
    m.Unknown(7, 99),
    m.Abort(7, "aborted", "asked for", 1),
)


def pack(*body: Any, version: Any = 1) -> bytes:
    """Returns a frame as another implementation may write it."""
    return msgspec.msgpack.encode([version, 5, 6, list(body)])


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: type(body).__name__)
def test_a_decoded_message_equals_the_encoded_one(body: m.Body) -> None:
    frame = m.Frame(1, 5, 6, body)
    assert m.decode(m.encode(frame)) == frame


def test_every_message_has_an_example() -> None:
    assert {type(body) for body in EXAMPLES} == set(m.Body.__args__)  # type: ignore[attr-defined]


def test_a_frame_has_the_bytes_of_the_specification() -> None:
    assert msgspec.msgpack.decode(m.encode(m.Frame(1, 5, 6, EXAMPLES[1]))) == [
        1, 5, 6, ["grant", 7, 3, 12, 15, [[2, 2], [9, 2]], 2, "tcp"],
    ]  # fmt: skip


def test_additional_fields_of_a_newer_peer_are_ignored() -> None:
    assert m.decode(pack("closed", 7, "new", [1, 2])).body == m.Closed(7)


def test_missing_fields_of_an_older_peer_have_their_defaults() -> None:
    assert m.decode(pack("abort", 7, "aborted", "asked for")).body == m.Abort(7, "aborted", "asked for", 0)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises((RemoteProtocolError, VersionMismatch)):
        m.decode(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=8) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)
TAGS = st.sampled_from([type(body).__struct_config__.tag for body in EXAMPLES])


@given(TAGS, st.lists(JSON, max_size=9))
def test_arbitrary_fields_raise_only_protocol_errors(tag: str, fields: list[Any]) -> None:
    try:
        frame = m.decode(pack(tag, *fields))
    except RemoteProtocolError:
        return
    assert m.decode(m.encode(frame)) == frame


@given(st.sampled_from(EXAMPLES), st.data())
def test_changed_bytes_raise_only_protocol_errors(body: m.Body, data: st.DataObject) -> None:
    wire = bytearray(m.encode(m.Frame(1, 5, 6, body)))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RemoteProtocolError, VersionMismatch):
        m.decode(bytes(wire[: data.draw(st.integers(0, len(wire)))]))


@pytest.mark.parametrize(
    "data",
    [
        pack("grant", 7, -1, 0, 1, [[0, 1]], 0),
        pack("grant", 7, 1, 1 << 40, 1, [[0, 1]], 0),
        pack("grant", 7, 1, 0, 0, [[0, 1]], 0),
        pack("grant", 7, 1, 0, 1, [], 0),
        pack("grant", 7, 1, 0, 1, [[1 << 32, 1]], 0),
        pack("grant", 7, 1, 0, 1, [[0, 0]], 0),
        pack("grant", 7, 1, 0, 1, [[0, 1]] * (m.MAX_RUNS + 1), 0),
        pack("drain", 7, list(range(4097))),
        pack("written", 7, 1, []),
        pack("written", 7, 1, [[0, 1, b"seven b"]]),
        pack("written", 7, 1, [[0, 1, b"8 bytes "]] * (m.MAX_CHUNKS + 1)),
        pack("offer", 7, 1, 1, "tcp", -2, b"", []),
        pack("offer", 7, 1, 1, "", 1, b"", []),
        pack("offer", 7, 1, 1, "tcp", 1, b"x" * 65, []),
        pack("offer", 7, 1, 1, "tcp", 1, b"x", [0] * 17),
        pack("offer", 7, 1, 1, "tcp", 1, b"x", [1 << 31]),
        pack("abort", 7, "c" * 65, ""),
        pack("abort", 7, "c", "x" * 1025),
        pack("closed", 1 << 63),
        pack("closed", -1),
        pack("closed"),
        pack("no such message", 7),
        b"\x94\x01\x05\x06\xdd\xff\xff\xff\xff",  # an array that claims 2**32 - 1 elements
        b"\x94\x01\x05\x06\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"",
    ],
)
def test_values_out_of_bounds_are_rejected(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(data)


def open_with(*geometry: Any) -> bytes:
    return pack("open", 7, 1, [1, 1], list(geometry), "language", [["tcp", b""]], 0)


FIELD = ["a", "uint8", 1]


@pytest.mark.parametrize(
    "data",
    [
        open_with([[FIELD] * 17], 1, 1),
        open_with([[FIELD] * 60_000], 1, 1),
        open_with([[]], 1, 1),
        open_with([[["", "uint8", 1]]], 1, 1),
        open_with([[["a" * 65, "uint8", 1]]], 1, 1),
        open_with([[["a", "u" * 33, 1]]], 1, 1),
        open_with([[["a", "uint8", 0]]], 1, 1),
        open_with([[["a", "uint8", (1 << 20) + 1]]], 1, 1),
        open_with([[FIELD]], 0, 1),
        open_with([[FIELD]], (1 << 32) + 1, 1),
        open_with([[FIELD]], 1, (1 << 20) + 1),
    ],
)
def test_a_geometry_out_of_bounds_is_rejected_while_it_is_decoded(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(data)


WORST = {
    "runs": pack("grant", 7, 1, 0, 1, [[0, 1]] * m.MAX_RUNS, 0, "tcp"),
    "large runs": pack("grant", 7, 1, 0, 1, [[1 << 20, 1 << 20]] * m.MAX_RUNS, 0, "tcp"),
    "too many runs": pack("grant", 7, 1, 0, 1, [[0, 1]] * 300_000, 0, "tcp"),
    "chunks": pack("written", 7, 1, [[0, 1, None]] * m.MAX_CHUNKS),
    "checked chunks": pack("written", 7, 1, [[1 << 20, 1 << 20, b"checksum"]] * m.MAX_CHUNKS),
    "epochs": pack("drain", 7, [1 << 9] * 4096),
    "fields": open_with([[[f"{at:02}", "uint8", 1] for at in range(16)]], 1, 1),
    "too many fields": open_with([[FIELD] * 100_000], 1, 1),
    "text": pack("abort", 7, "aborted", "\U0001f6a2" * m.MAX_TEXT),
    "unknown fields": pack("closed", 7, [[]] * 1_000_000),
    "unknown nested fields": pack("closed", 7, [[[[0]]]] * 200_000),
    "transports": pack("open", 7, 1, [1, 1], [[[FIELD]], 1, 1], "language", [["t", b""]] * 200_000, 0),
}
MOST_OBJECT_BYTES = 28
"""Bytes of memory that one byte of a frame may cost: a run of 3 bytes becomes a pair of 80."""


@pytest.mark.parametrize("kind", WORST)
def test_decoding_takes_memory_in_proportion_to_the_frame(kind: str) -> None:
    data = WORST[kind]
    assert len(data) <= m.MAX_FRAME_BYTES
    m.decode(m.encode(m.Frame(1, 5, 6, m.Closed(7))))  # what msgspec allocates once does not count
    tracemalloc.start()
    try:
        with suppress(RemoteProtocolError):
            m.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_OBJECT_BYTES * len(data) + 4096


def test_text_that_is_not_utf_8_is_rejected() -> None:
    data = pack("drained", 7, [3]).replace(b"drained", b"\x80rained")
    with pytest.raises(RemoteProtocolError):
        m.decode(data)


def test_a_frame_over_the_limit_is_rejected_without_decoding() -> None:
    with pytest.raises(RemoteProtocolError, match=str(m.MAX_FRAME_BYTES)):
        m.decode(b"\x00" * (m.MAX_FRAME_BYTES + 1))


def test_the_largest_grant_fits_into_a_frame() -> None:
    runs = tuple((block, 1) for block in range((1 << 32) - 2 * m.MAX_RUNS, 1 << 32, 2))
    data = m.encode(m.Frame(1, (1 << 63) - 1, (1 << 63) - 1, m.Grant(1, 1, 0, m.MAX_RUNS, runs, 0, "tcp")))
    assert len(m.decode(data).body.runs) == m.MAX_RUNS  # type: ignore[union-attr]


def test_another_version_is_recognised_although_its_messages_differ() -> None:
    with pytest.raises(VersionMismatch, match="version 2"):
        m.decode(msgspec.msgpack.encode([2, {"all": "new"}]))


@pytest.mark.parametrize(("theirs", "common"), [((1, 1), 1), ((1, 9), 1), ((0, 1), 1)])
def test_the_newest_common_version_is_chosen(theirs: tuple[int, int], common: int) -> None:
    assert m.common_version(theirs) == common


@pytest.mark.parametrize("theirs", [(2, 3), (0, 0), (5, 1)])
def test_without_a_common_version_the_error_names_both_ranges(theirs: tuple[int, int]) -> None:
    with pytest.raises(VersionMismatch, match=f"1-1.*{theirs[0]}-{theirs[1]}"):
        m.common_version(theirs)


def test_an_error_keeps_its_type_room_and_retryability_on_the_wire() -> None:
    error = TransportError("x" * 3000, room=7, retryable=False)
    abort = m.Abort.because_of(error, 7, generation=2)
    assert (type(abort.error), abort.error.room, len(abort.error.detail)) == (TransportError, 7, m.MAX_TEXT)
    assert m.decode(m.encode(m.Frame(1, 5, 6, abort))).body == abort
    failed = m.WriteFailed(7, 3, 12, 8, "transport_error", "refused", False)
    assert (type(failed.error), failed.error.retryable) == (TransportError, False)
