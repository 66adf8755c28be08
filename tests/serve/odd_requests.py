"""Requests that no client should send: whole ones with some values replaced, removed or added; bodies that are none."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import logging
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from embferry.serve.openai.fields import CONSTRAINTS, LIMITED, NEUTRAL
from embferry.serve.openai.request import ChatRequest

EXAMPLES = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Has no host an address, and nothing logged, in this block."""

    def not_found(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", not_found)
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


_ROWS = zlib.compress(b"".join(b"\0" + b"\x80" * 24 for _ in range(8)))
_PNG = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", _ROWS)
PNG = "data:image/png;base64," + base64.b64encode(_PNG + _chunk(b"IEND", b"")).decode()
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": ["look", {"type": "image_url", "image_url": {"url": PNG, "detail": "auto"}}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "seen"}]},
    {"role": "user", "content": [{"type": "video", "video": [PNG, PNG], "fps": 2}]},
]
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "shapes", "messages": MESSAGES, "max_tokens": 5, "temperature": 0.5, "stop": ["a"], "n": 1,
        "logit_bias": {"5": 1}, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
        "top_logprobs": 2, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    },
    "/v1/completions": {"prompt": "once", "max_tokens": 5, "logprobs": 1, "structured_outputs": {"choice": ["a"]}},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "?"}]}], "instructions": "be brief",
        "text": {"format": {"type": "text"}}, "max_output_tokens": 5,
    },
    "/tokenize": {"messages": MESSAGES[:1], "add_generation_prompt": True, "return_token_strs": True},
    "/detokenize": {"tokens": [104, 105]},
}  # fmt: skip
HUGE = 10**400
URLS = (
    "http://a b/c", "http://a\tb/c", "http://a.example/b c\n", "http://" + "a" * 300 + "/", "http://[::1", "https://",
    "http://x:99999/", "http://x:y@/", "http://a.example/" + "a" * 70_000, "data:", "data:image/png;base64,\x00",
    "data:video/jpeg;base64,,,", "file:///\x00", "file://host/etc", "//x", "\\\\x", "http://a..b/", "http://a%00b/",
)  # fmt: skip
NASTY: list[Any] = [
    None, True, -1, 0, 0.5, 1e308, -1e-320, HUGE, -HUGE, 1 << 64, "", "x", "x" * 2000, "\x00\u2028\U0001f600",
    [], {}, [None], [[]], {"": None}, {"a": {"b": []}}, [HUGE], {"url": HUGE}, {"type": "text", "text": None}, *URLS,
]  # fmt: skip
NAMES = sorted({*ChatRequest.model_fields, *LIMITED, *NEUTRAL, *CONSTRAINTS, "fps", "type", "url", "temprature"})
RAW: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"null", b"\xff", b'{"messages": "\\ud800"}', b'{"model": "\\udfff\\ud800"}', b"[" * 5000,
    b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"temperature": 1e999}', b'{"a": NaN}', b'\xef\xbb\xbf{"a": 1}',
    b'{"messages": 1, "messages": []}', b'{"\\u0000": 1}',
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the place of each value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        yield (*at, name)
        yield from places(one, (*at, name))


values = st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draws a path and a body: a whole request of which some values are replaced, removed or added."""
    path = draw(st.sampled_from(sorted(WHOLE)))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(st.sampled_from(RAW))
    body = copy.deepcopy(WHOLE[path])
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(body))
        if not found or draw(st.booleans()):
            body[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(values))
            continue
        *parents, last = draw(st.sampled_from(found))
        holder = body
        for name in parents:
            holder = holder[name]
        if draw(st.booleans()):
            holder[last] = copy.deepcopy(draw(values))
        else:
            del holder[last]
    return path, json.dumps(body).encode()


def check(status: int, body: bytes) -> None:
    """Checks that a request was answered, or refused as its client's mistake."""
    assert status == 200 or 400 <= status < 500, body
    if status != 200:
        error = json.loads(body)["error"]
        assert error["message"].isprintable()
        assert len(error["message"]) < 3000
