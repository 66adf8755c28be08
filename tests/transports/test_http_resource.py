"""Statuses, headers and byte ranges of an embedding resource: RFC 9110 §13, §14 and RFC 9530."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.transports.http.resource import Answer, Representation, answer, wants_digest

ETAG = '"0a1b"'
BODY = bytes(range(100))
METHODS = ("GET", "HEAD", "DELETE")


def of(length: int = 100, ready: int | None = None, sha256: bytes | None = None) -> Representation:
    return Representation(length, ETAG, length if ready is None else ready, sha256, METHODS, {"X-Fixed": "yes"})


def get(length: int = 100, **headers: str) -> Answer:
    return answer("GET", {name.replace("_", "-"): value for name, value in headers.items()}, of(length))


LENGTHS = st.integers(0, 300)
POSITIONS = st.one_of(st.integers(0, 310), st.integers(0, 10**40))


@given(LENGTHS, POSITIONS, st.one_of(st.none(), POSITIONS))
def test_a_range_is_the_bytes_it_names(length: int, first: int, last: int | None) -> None:
    found = get(length, range=f"bytes={first}-{'' if last is None else last}")
    if last is not None and last < first:
        assert found == get(length)
        return
    named = [at for at in range(length) if first <= at and (last is None or at <= last)]
    if not named:
        assert (found.status, found.headers["Content-Range"]) == (416, f"bytes */{length}")
        assert found.start == found.stop
        return
    assert (found.status, list(range(found.start, found.stop))) == (206, named)
    assert found.headers["Content-Range"] == f"bytes {named[0]}-{named[-1]}/{length}"
    assert found.headers["Content-Length"] == str(len(named))


@given(LENGTHS, POSITIONS)
def test_a_suffix_is_the_last_bytes(length: int, count: int) -> None:
    found = get(length, range=f"bytes=-{count}")
    if count == 0:
        assert (found.status, found.headers["Content-Range"]) == (416, f"bytes */{length}")
    elif length == 0:
        assert found == get(length), "no Content-Range names an empty part"
    else:
        assert (found.status, found.start, found.stop) == (206, max(0, length - count), length)


@given(st.lists(st.integers(1, 60), max_size=12), st.booleans())
def test_resuming_wherever_it_was_cut_gives_the_whole(cuts: list[int], conditional: bool) -> None:
    have = b""
    for cut in [*cuts, len(BODY)]:
        headers = {"range": f"bytes={len(have)}-", **({"if-range": ETAG} if conditional else {})} if have else {}
        found = answer("GET", headers, of())
        if found.status == 416:
            break
        assert found.status == (206 if have else 200)
        have += BODY[found.start : found.stop][:cut]
    assert have == BODY


NAMES = ("range", "if-range", "if-match", "if-none-match", "want-repr-digest")
WORDS = st.lists(
    st.sampled_from(
        ["bytes", "=", "-", ",", "0", "7", "99", "100", "1" * 5000, "²", "*", ETAG, "W/", '"', " ", "\t", "x"]
    ),
    max_size=8,
).map("".join)
VALUES = st.one_of(WORDS, st.text(alphabet=st.characters(max_codepoint=255), max_size=20))


@given(
    st.sampled_from([*METHODS, "POST", "get", ""]),
    st.dictionaries(st.sampled_from(NAMES), VALUES),
    st.integers(0, 120),
    st.integers(0, 120),
)
def test_any_request_gets_a_consistent_response(method: str, headers: dict[str, str], length: int, ready: int) -> None:
    found = answer(method, headers, of(length, min(ready, length)))
    assert found.status in (200, 204, 206, 304, 405, 412, 416)
    assert 0 <= found.start <= found.stop <= length
    if found.start < found.stop:
        assert method == "GET"
        assert found.headers["Content-Length"] == str(found.stop - found.start)
        assert found.waits == (found.start >= min(ready, length))
    else:
        assert not found.waits
    assert ("Content-Range" in found.headers) == (found.status in (206, 416))
    if found.status in (200, 206, 304, 412, 416):
        assert found.headers["ETag"] == ETAG
    assert all("\r" not in value and "\n" not in value for value in found.headers.values())
    wants_digest(headers)


IGNORED = [
    "bytes=0-1,5-6",
    "bytes=0-1, 500-",
    "bytes=5-2",
    "bytes=",
    "bytes=-",
    "bytes=a-b",
    "bytes=0x1-2",
    "bytes=+1-2",
    "bytes=1 - 2",
    "bytes=1-2;",
    "bytes=²-",
    "tokens=0-1",
    "bytes 0-1",
    "bytes=0-1, bytes=2-3",
    "",
]


@pytest.mark.parametrize("field", IGNORED)
def test_an_invalid_range_is_ignored(field: str) -> None:
    assert get(range=field) == get()
    assert (get().status, get().start, get().stop) == (200, 0, 100)


def test_range_units_are_case_insensitive() -> None:
    assert get(range="Bytes=1-2").status == 206  # §14.1


@pytest.mark.parametrize(
    ("if_range", "status"),
    [
        (ETAG, 206),
        (f"W/{ETAG}", 200),
        ('"other"', 200),
        (f'{ETAG}, "other"', 200),
        ("*", 200),
        ("", 200),
        ("Tue, 24 Nov 2026 17:00:00 GMT", 200),
        ("0a1b", 200),
    ],
)
def test_if_range_accepts_the_strong_tag_only(if_range: str, status: int) -> None:
    assert get(range="bytes=10-", if_range=if_range).status == status
    assert get(if_range=if_range).status == 200


CONDITIONS = [
    ({"if-match": ETAG}, 200, 200, 204),
    ({"if-match": "*"}, 200, 200, 204),
    ({"if-match": f'"x,", {ETAG}'}, 200, 200, 204),
    ({"if-match": f"W/{ETAG}"}, 412, 412, 412),
    ({"if-match": '"other"'}, 412, 412, 412),
    ({"if-match": "0a1b"}, 412, 412, 412),
    ({"if-match": '"x, "0a1b", y"'}, 412, 412, 412),
    ({"if-none-match": ETAG}, 304, 304, 412),
    ({"if-none-match": f'"other" ,W/{ETAG}'}, 304, 304, 412),
    ({"if-none-match": "*"}, 304, 304, 412),
    ({"if-none-match": '"other"'}, 200, 200, 204),
    ({"if-match": '"other"', "if-none-match": ETAG}, 412, 412, 412),
    ({"if-match": ETAG, "if-none-match": ETAG}, 304, 304, 412),
    ({"if-modified-since": "Tue, 24 Nov 2026 17:00:00 GMT"}, 200, 200, 204),
]


@pytest.mark.parametrize(("headers", "get_status", "head_status", "delete_status"), CONDITIONS)
def test_each_condition_gives_its_status(
    headers: dict[str, str], get_status: int, head_status: int, delete_status: int
) -> None:
    assert answer("GET", headers, of()).status == get_status
    assert answer("HEAD", headers, of()).status == head_status
    assert answer("DELETE", headers, of()).status == delete_status
    if get_status != 200:
        assert answer("GET", {**headers, "range": "bytes=5-"}, of()).status == get_status, "conditions come first"


def test_head_has_the_headers_of_get() -> None:
    whole, described = answer("GET", {}, of()), answer("HEAD", {"range": "bytes=5-"}, of())
    assert (described.status, described.headers) == (200, whole.headers)
    assert described.start == described.stop
    assert whole.headers["Accept-Ranges"] == "bytes"
    assert whole.headers["X-Fixed"] == "yes"


def test_an_unsupported_method_gets_405_and_allow() -> None:
    found = answer("POST", {"if-match": '"x"'}, of())
    assert (found.status, found.headers["Allow"]) == (405, "GET, HEAD, DELETE")


def test_a_known_digest_is_sent() -> None:
    sha256 = hashlib.sha256(BODY).digest()
    said = f"sha-256=:{base64.b64encode(sha256).decode()}:"
    whole, part = (answer("GET", headers, of(sha256=sha256)) for headers in ({}, {"range": "bytes=1-2"}))
    assert (whole.headers["Repr-Digest"], whole.headers["Content-Digest"]) == (said, said)
    assert part.headers["Repr-Digest"] == said
    assert "Content-Digest" not in part.headers
    assert re.fullmatch(r"sha-256=:[A-Za-z0-9+/]{43}=:", said)
    assert not {"Repr-Digest", "Content-Digest"} & get().headers.keys()
    brief = answer("GET", {"range": "bytes=1-2", "if-range": ETAG}, of(sha256=sha256))
    assert "Repr-Digest" not in brief.headers, "RFC 9110 §15.3.7"


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("sha-256=10", True),
        ("sha-512=3, sha-256=1", True),
        ("sha-256=0", False),
        ("md5=9", False),
        ("xsha-256=3", False),
        ("sha-256", False),
        ("", False),
        ("sha-256=²", False),
    ],
)
def test_the_want_digest_field_is_parsed(field: str, wanted: bool) -> None:
    assert wants_digest({"want-repr-digest": field}) == wanted
    assert wants_digest({"want-content-digest": field}) == wanted
    assert not wants_digest({})


def test_a_response_waits_until_its_first_byte_is_ready() -> None:
    for headers, start in (({}, 0), ({"range": "bytes=40-"}, 40)):
        assert answer("GET", headers, of(100, ready=start)).waits
        assert not answer("GET", headers, of(100, ready=start + 1)).waits
