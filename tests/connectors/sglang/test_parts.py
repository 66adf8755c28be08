"""Names of parts, and the dispatcher's messages about them."""

from __future__ import annotations

import pytest

from embferry import RemoteProtocolError
from embferry.connectors.sglang.parts import EncoderInfo, PartId, Source, decode_source, encode_source, parse

NAME = "0123456789abcdef" * 2
INFO = EncoderInfo("tcp://127.0.0.1:1", "float32", 8)


@pytest.mark.parametrize("rid", ["a", "", "a_local_part_0", f"a_local_part_{NAME}.1.2", "ü\n"])
def test_a_part_is_found_in_its_text(rid: str) -> None:
    part = PartId(rid, NAME, 12, 3)
    assert parse(part.text) == part


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a_local_part_0",
        f"a_local_part_{NAME}",
        f"a_local_part_{NAME}.1",
        f"a{NAME}.1.2",
        f"a_local_part_{NAME}.9999.0",
    ],
)
def test_another_text_is_no_part(text: str) -> None:
    assert parse(text) is None


def test_two_dispatches_of_a_request_have_nothing_in_common() -> None:
    first, second = PartId("same", "0" * 32, 0), PartId("same", "1" * 32, 0)
    assert first.text != second.text
    assert first.room(0) != second.room(0)


def test_the_room_is_that_of_the_part_and_the_host() -> None:
    part = PartId("a", NAME, 0)
    assert part.room(0) == PartId("b", NAME, 0, attempt=7).room(0)
    rooms = {part.room(0), part.room(1), PartId("a", NAME, 1).room(0)}
    assert len(rooms) == 3
    assert all(0 <= room < 1 << 63 for room in rooms)


def test_a_source_arrives_as_it_was() -> None:
    source = Source(NAME, 1, 2, "http://e:1", INFO)
    assert decode_source(encode_source(source)) == source
    assert source.part_of("a") == PartId("a", NAME, 1, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NAME, "x"),
        ("tcp://127.0.0.1:1", "ipc:///tmp/x"),
        ('"index":1', '"index":-1'),
        ("{", "["),
        ("url", "uri"),
    ],
)
def test_a_malformed_source_is_refused(old: str, new: str) -> None:
    text = encode_source(Source(NAME, 1, 2, "http://e:1", INFO))
    with pytest.raises(RemoteProtocolError, match="malformed message of the dispatcher"):
        decode_source(text.replace(old, new))
