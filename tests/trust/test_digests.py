"""Digests of bodies, messages and lines: what has changed on its way is not taken for what was sent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.trust import digests
from embferry.trust.digests import (
    DamagedError,
    LineReader,
    LineWriter,
    answer_digest,
    check_answer,
    check_content,
    check_foreign_content,
    content_digest,
    request_digest,
)

BODY = b'{"hello": "world"}\n'
OF_BODY = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
"""The example of RFC 9530, appendix D."""
REQUEST = request_digest("POST", "/generate", "19", OF_BODY)
LINES = st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=5)


def flips(data: bytes) -> Iterable[bytes]:
    """Yields the data with one bit flipped, for each bit."""
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def read(pieces: Iterable[bytes]) -> tuple[list[bytes], bool]:
    """Returns the lines that a reader takes from these pieces, and whether it has noticed damage."""
    reader, lines = LineReader(REQUEST), list[bytes]()
    with contextlib.suppress(DamagedError):
        for piece in pieces:
            lines += reader.feed(piece)
        return lines, False
    return lines, True


def test_a_content_digest_is_that_of_the_standard() -> None:
    assert content_digest(BODY) == OF_BODY
    check_content(OF_BODY, BODY)


def test_every_flip_of_a_body_or_its_digest_is_noticed() -> None:
    for changed in flips(BODY):
        with pytest.raises(DamagedError):
            check_content(OF_BODY, changed)
    for value in flips(OF_BODY.encode()):
        with pytest.raises(DamagedError):
            check_content(value.decode("latin-1"), BODY)
    with pytest.raises(DamagedError):
        check_content(None, BODY)


@pytest.mark.parametrize(
    "value",
    [
        OF_BODY,
        f"md5=:AAAA:, {OF_BODY}",
        "unixsum=:AAAA:",
        f"sha-512=:{base64.b64encode(hashlib.sha512(BODY).digest()).decode()}:",
        f"{OF_BODY};a=1",
        f' {OF_BODY};a; b="x, y=:\\":;";*c=?0;d=to/k:en;e=:AA==:;f=-1.5;g=@12;h=%"%c3", md5=:AAAA:;a=1 ',
        f"md5=:AAAA:;a=1,{OF_BODY};a=2",
    ],
)
def test_a_right_foreign_digest_is_accepted(value: str) -> None:
    check_foreign_content(value, BODY)


@pytest.mark.parametrize(
    "value",
    [
        "", "sha-256", "sha-256=RK/0", "sha-256=:!:", f"{OF_BODY}, sha-512=:AAAA:",
        f"{OF_BODY};a=1, sha-512=:AAAA:;a=1", "sha-256=:AAAA:;a=1", f"{OF_BODY},", f"{OF_BODY};", f"{OF_BODY};A",
        f"{OF_BODY};a=", f'{OF_BODY};a="', f"{OF_BODY} {OF_BODY}", f",{OF_BODY}",
    ],
)  # fmt: skip
def test_a_malformed_or_wrong_foreign_digest_is_refused(value: str) -> None:
    with pytest.raises(DamagedError):
        check_foreign_content(value, BODY)


def test_a_body_is_hashed_once_with_each_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header has room for a thousand digests, and a body may have 192 MiB."""
    hashed: list[str] = []
    for name, algorithm in list(digests._ALGORITHMS.items()):

        def count(body: bytes, name: str = name, algorithm: Callable[..., Any] = algorithm) -> Any:
            hashed.append(name)
            return algorithm(body)

        monkeypatch.setitem(digests._ALGORITHMS, name, count)
    other = f"sha-512=:{base64.b64encode(hashlib.sha512(BODY).digest()).decode()}:"
    check_foreign_content(", ".join([OF_BODY, other] * 500), BODY)
    assert sorted(hashed) == ["sha-256", "sha-512"]


def test_no_flip_makes_a_foreign_digest_accept_another_body() -> None:
    for changed in flips(BODY):
        with pytest.raises(DamagedError):
            check_foreign_content(OF_BODY, changed)


def test_a_request_digest_covers_all_of_it() -> None:
    others = [
        ("PUT", "/generate", "19", OF_BODY),
        ("POST", "/rooms/1", "19", OF_BODY),
        ("POST", "/generate", None, None),
    ]
    others += [("POST", "/generate", "1", OF_BODY), ("POST", "/generate", "19", OF_BODY.replace("RK", "RL"))]
    assert len({REQUEST, *(request_digest(*other) for other in others)}) == 6


def test_an_answer_belongs_to_one_request_and_one_status() -> None:
    headers = {"content-digest": OF_BODY, "embferry-digest": answer_digest(REQUEST, 200, OF_BODY)}
    check_answer(REQUEST, 200, headers, BODY)
    for request, status, changes in (
        (REQUEST, 201, {}),
        (REQUEST[::-1], 200, {}),
        (REQUEST, 200, {"embferry-digest": REQUEST}),
        (REQUEST, 200, {"content-digest": content_digest(b"")}),
    ):
        with pytest.raises(DamagedError):
            check_answer(request, status, headers | changes, BODY)


@given(LINES, st.data())
def test_lines_arrive_however_they_are_cut(contents: list[bytes], data: st.DataObject) -> None:
    writer = LineWriter(REQUEST)
    sent = b"".join(map(writer.line, contents))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=4)))
    assert read(sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)) == (contents, False)


def test_every_flip_of_lines_is_noticed() -> None:
    writer, contents = LineWriter(REQUEST), [b'{"type":"ping"}', b"", '{"text":"ä\u2028"}'.encode(), b"end"]
    sent = [writer.line(content) for content in contents]
    for changed in flips(b"".join(sent)):
        lines, noticed = read([changed[at : at + 1] for at in range(len(changed))])
        assert lines == contents[: len(lines)]
        assert len(lines) < len(contents)
        assert noticed or changed.count(b"\n") < len(contents)  # its end is missing, so more is waited for


@given(st.lists(st.integers(0, 3), max_size=6))
def test_lines_that_are_lost_repeated_or_moved_are_noticed(order: list[int]) -> None:
    writer, contents = LineWriter(REQUEST), [b"a", b"a", b"", b"b"]
    sent = [writer.line(content) for content in contents]
    lines, noticed = read([sent[number] for number in order])
    assert lines == contents[: len(lines)]
    assert noticed == (order != list(range(len(order))))


def test_lines_of_another_request_are_noticed() -> None:
    assert read([LineWriter(REQUEST[::-1]).line(b"a")]) == ([], True)


def test_a_line_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MAX_LINE_BYTES", 100)
    assert read([b"x" * 60]) == ([], False)
    assert read([b"x" * 60] * 2) == ([], True)
