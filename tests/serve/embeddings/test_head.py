"""Heads of HTTP/1.1 messages, good and bad."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.transports.http import head
from embferry.transports.http.head import HttpError


def test_what_is_written_is_read() -> None:
    data = head.request("GET", "/a?b=1", {"Host": "h", "Range": "bytes=1-"})
    assert data.endswith(head.END)
    request = head.parse_request(data[:-4])
    assert (request.method, request.target, request.closes) == ("GET", "/a?b=1", False)
    assert request.headers == {"host": "h", "range": "bytes=1-"}
    response = head.parse_response(head.response(206, {"ETag": '"x"', "Connection": "close"})[:-4])
    assert (response.status, response.headers["etag"], response.closes) == (206, '"x"', True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1",
        b"GET / HTTP/2\r\nHost: h",
        b"GET  / HTTP/1.1\r\nHost: h",
        b"GET /\r\nHost: h",
        b"",
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\nHost : h",
        b"GET / HTTP/1.1\r\nHost: h\r\n folded",
        b"GET / HTTP/1.1\r\nHost: h\r\nx",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x00c",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\nc",
        b"GET / HTTP/1.1\nHost: h",
        b"GET / HTTP/1.1\r\nHost: h" + b"\r\na: b" * 100,
    ],
)
def test_bad_requests(data: bytes) -> None:
    with pytest.raises(HttpError):
        head.parse_request(data)


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 20 OK", b"HTTP/1.1 600 No", b"SSH-2.0-x", b"HTTP/2 200", b"HTTP/1.1 200 \x00"]
)
def test_bad_responses(data: bytes) -> None:
    with pytest.raises(HttpError):
        head.parse_response(data)


@pytest.mark.parametrize(
    ("start", "fields", "closes"),
    [
        (b"HTTP/1.1 200 OK", b"", False),
        (b"HTTP/1.1 200", b"", False),
        (b"HTTP/1.1 200 OK", b"\r\nConnection: x, Close", True),
        (b"HTTP/1.0 200 OK", b"", True),
        (b"HTTP/1.0 200 OK", b"\r\nConnection: Keep-Alive", False),
    ],
)
def test_who_closes(start: bytes, fields: bytes, closes: bool) -> None:
    assert head.parse_response(start + fields).closes == closes


@pytest.mark.parametrize(
    "headers",
    [{"content-length": value} for value in ("-1", "+1", "1, 1", "1 1", "", "0x1", "²", "9" * 19)]
    + [{"transfer-encoding": "chunked"}, {"transfer-encoding": "chunked", "content-length": "3"}],
)
def test_lengths_that_are_none(headers: dict[str, str]) -> None:
    with pytest.raises(HttpError):
        head.content_length(headers)
    assert head.content_length({"content-length": "007"}) == 7
    assert head.content_length({}) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for parse in (head.parse_request, head.parse_response):
        for start in (b"", b"GET / HTTP/1.1\r\nHost: h\r\n", b"HTTP/1.1 200 OK\r\n"):
            try:
                parsed = parse(start + data)
                head.content_length(parsed.headers)
            except HttpError:
                continue
            assert all("\r" not in value and "\n" not in value for value in parsed.headers.values())
