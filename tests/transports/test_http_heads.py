"""Heads of HTTP/1.1 messages, valid and malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.transports.http import heads
from embferry.transports.http.heads import HttpError

REQUEST = b"GET / HTTP/1.1\r\nHost: h"


def test_a_written_head_parses_to_the_same() -> None:
    data = heads.write_request("GET", "/a?b=1", {"Host": "h", "Range": "bytes=1-"})
    assert data == b"GET /a?b=1 HTTP/1.1\r\nHost: h\r\nRange: bytes=1-\r\n\r\n"
    request = heads.parse_request(data[:-4])
    assert (request.method, request.target, request.closes) == ("GET", "/a?b=1", False)
    assert request.headers == {"host": "h", "range": "bytes=1-"}
    data = heads.write_response(206, {"ETag": '"x"', "Content-Length": "7", "Connection": "close"})
    assert data == b'HTTP/1.1 206 Partial Content\r\nETag: "x"\r\nContent-Length: 7\r\nConnection: close\r\n\r\n'
    response = heads.parse_response(data[:-4])
    assert (response.status, response.headers["etag"], response.closes) == (206, '"x"', True)


@pytest.mark.parametrize("status", [204, 304, 400, 403, 404, 405, 410, 412, 413, 416])
def test_a_response_without_a_body_has_the_given_fields_alone(status: int) -> None:
    fields = {} if status in (204, 304) else {"Content-Length": "0"}
    response = heads.parse_response(heads.write_response(status, fields)[:-4])
    assert (response.status, response.closes) == (status, False)
    assert response.headers == {name.lower(): value for name, value in fields.items()}


def test_values_of_repeated_fields_are_joined() -> None:
    assert heads.parse_request(REQUEST + b"\r\nA: b\r\na:c \r\nA: \xe9").headers["a"] == "b, c, \xe9"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1",
        b"GET / HTTP/2\r\nHost: h",
        b"GET / HTTP/2.0\r\nHost: h",
        b"GET  / HTTP/1.1\r\nHost: h",
        b"GET /\r\nHost: h",
        b"",
        b"\r\n" + REQUEST,
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\nHost : h",
        REQUEST + b"\r\nHost: h",
        REQUEST + b"\r\n folded",
        REQUEST + b"\r\nA: b\r\n\tfolded",
        b"GET / HTTP/1.1\r\n Host: h",
        REQUEST + b"\r\nx",
        REQUEST + b"\r\nA: b\x00c",
        REQUEST + b"\r\nA: b\x01c",
        REQUEST + b"\r\nA: b\x7fc",
        REQUEST + b"\r\nA: b\nc",
        REQUEST + b"\r\nA: b\rc",
        REQUEST + b"\nA: b",
        REQUEST + b"\r",
        b"GET / HTTP/1.1\nHost: h",
        REQUEST + b"\r\na: b" * 100,
    ],
)
def test_a_malformed_request_is_rejected(data: bytes) -> None:
    with pytest.raises(HttpError):
        heads.parse_request(data)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 600 No",
        b"SSH-2.0-x",
        b"HTTP/2 200",
        b"HTTP/2.0 200",
        b"HTTP/1.1 200 \x00",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c",
        b"HTTP/1.1 200 OK\nA: b",
        REQUEST,
    ],
)
def test_a_malformed_response_is_rejected(data: bytes) -> None:
    with pytest.raises(HttpError):
        heads.parse_response(data)


def test_an_error_does_not_quote_the_head() -> None:
    """A malformed line may be the one with the secret, and errors go to the log."""
    with pytest.raises(HttpError) as caught:
        heads.parse_request(REQUEST + b"\r\nAuthorization : Bearer 0123")
    assert "0123" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "fields", "closes"),
    [
        (b"HTTP/1.1 200 OK", b"", False),
        (b"HTTP/1.1 200", b"", False),
        (b"HTTP/1.1 103 Early Hints", b"\r\nLink: x", False),
        (b"HTTP/1.1 200 OK", b"\r\nConnection: x, Close", True),
        (b"HTTP/1.0 200 OK", b"", True),
        (b"HTTP/1.0 200 OK", b"\r\nConnection: Keep-Alive", False),
    ],
)
def test_version_and_connection_field_say_whether_the_connection_closes(
    start: bytes, fields: bytes, closes: bool
) -> None:
    assert heads.parse_response(start + fields).closes == closes


BAD_LENGTHS = [
    f"Content-Length: {value}" for value in ("-1", "+1", "1, 1", "1 1", "", "0x1", "\xb2", "9" * 19, "9" * 5000)
]
BAD_LENGTHS += ["Content-Length: 3\r\nContent-Length: 3", "Content-Length: 3\r\nA: b\r\ncontent-length: 4"]
BAD_LENGTHS += ["Transfer-Encoding: chunked", "Transfer-Encoding: gzip"]
BAD_LENGTHS += ["Transfer-Encoding: chunked\r\nContent-Length: 3", "Transfer-Encoding: chunked\r\nTransfer-Encoding: a"]


@pytest.mark.parametrize("fields", BAD_LENGTHS)
def test_a_body_without_one_plain_length_is_rejected(fields: str) -> None:
    for start, parse in ((REQUEST, heads.parse_request), (b"HTTP/1.1 200 OK", heads.parse_response)):
        with pytest.raises(HttpError):
            heads.content_length(parse(start + b"\r\n" + fields.encode("latin-1")).headers)


def test_the_length_of_a_body_is_its_content_length() -> None:
    assert heads.content_length(heads.parse_request(REQUEST + b"\r\nContent-Length: 007").headers) == 7
    assert heads.content_length(heads.parse_request(REQUEST).headers) is None


def test_a_head_ends_at_its_empty_line_and_is_not_too_long() -> None:
    assert heads.head_length(b"a\r\nb\r\n") == -1
    assert heads.head_length(b"a\r\nb\r\n\r\nbody\r\n\r\n") == 4
    longest = b"a" * heads.MAX_HEAD_BYTES
    assert heads.head_length(longest) == -1
    assert heads.head_length(longest + heads.END) == len(longest)
    for end in (b"", heads.END):
        with pytest.raises(HttpError):
            heads.head_length(longest + b"a" + end)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_rejected(data: bytes) -> None:
    for parse in (heads.parse_request, heads.parse_response):
        for start in (b"", b"GET / HTTP/1.1\r\nHost: h\r\n", b"HTTP/1.1 200 OK\r\n"):
            try:
                parsed = parse(start + data)
                heads.content_length(parsed.headers)
            except HttpError:
                continue
            assert all("\r" not in value and "\n" not in value for value in parsed.headers.values())
