"""No request that a client can write makes the router fail: 500 is for bugs alone."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.serve.openai.fields import CONSTRAINTS, LIMITED, NEUTRAL
from embferry.serve.openai.request import ChatRequest
from embferry.serve.router.app import build
from tests.serve import pictures
from tests.serve.inside import Inside

PNG = pictures.data_url(pictures.png())
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
            body[draw(st.sampled_from(NAMES))] = draw(values)
            continue
        *parents, last = draw(st.sampled_from(found))
        holder = body
        for name in parents:
            holder = holder[name]
        if draw(st.booleans()):
            holder[last] = draw(values)
        else:
            del holder[last]
    return path, json.dumps(body).encode()


values = st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that posts a body to the router, where media may come from any host, of which none is found."""

    def not_found(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr("socket.getaddrinfo", not_found)
    logging.disable(logging.CRITICAL)
    deployment = Inside(media={"allowed_hosts": ("*",)})
    with asyncio.Runner() as runner:
        app = build(deployment.settings, httpx.ASGITransport(deployment._app()))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")

        def ask(path: str, content: bytes, **headers: str) -> httpx.Response:
            return runner.run(client.post(path, content=content, headers=headers))

        yield ask
        runner.run(client.aclose())
    deployment.close()
    logging.disable(logging.NOTSET)


def check(response: httpx.Response) -> None:
    """Checks that a request was answered, or refused as its client's mistake."""
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"].isprintable()
        assert len(error["message"]) < 3000


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changed())
def test_a_changed_request_is_answered_or_refused(asked: Any, sent: tuple[str, bytes]) -> None:
    path, body = sent
    check(asked(path, body))


@pytest.mark.parametrize("body", RAW, ids=repr)
@pytest.mark.parametrize("path", WHOLE)
def test_a_body_that_is_no_request_is_refused(asked: Any, path: str, body: bytes) -> None:
    response = asked(path, body)
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("url", URLS, ids=lambda url: url[:20].encode("ascii", "backslashreplace").decode())
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_a_url_that_is_none_is_refused(asked: Any, kind: str, url: str) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}
    response = asked("/v1/chat/completions", json.dumps(body).encode())
    check(response)
    assert response.status_code in (400, 403)
    assert response.json()["error"]["param"].startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-encoding": "gzip"}, {"content-digest": "x"}, {"content-length": "9" * 400},
        {"x-request-id": "\\xfc\\n"}, {"authorization": "Bearer"}, {"x-forwarded-for": "x"},
        {"content-type": "multipart/form-data"}, {"embferry-digest": "0"}, {"origin": "null"},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_that_are_odd(asked: Any, headers: dict[str, str]) -> None:
    check(asked("/v1/chat/completions", json.dumps(WHOLE["/v1/chat/completions"]).encode(), **headers))
    check(asked("/v1/chat/completions", gzip.compress(b"{"), **headers))


@pytest.mark.parametrize(
    "path", ["/v1/models/" + "9" * 5000, "/%00", "/v1/chat/completions/", "/v1//models", "/é", "/%ff"]
)
def test_paths_that_there_are_not(asked: Any, path: str) -> None:
    response = asked(path, b"{}")
    if response.status_code != 307:  # to the path without the slash
        assert response.status_code in (404, 405)
        check(response)
