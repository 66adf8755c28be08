"""Times of a streamed answer by vLLM's definitions, and answers that are none."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from embferry.bench.serving.stream import Events, Stream


def choice(content: str = "", tokens: list[int] | None = None, **more: Any) -> str:
    return json.dumps({"choices": [{"delta": {"content": content}, "token_ids": tokens, **more}]})


def streamed(*chunks: tuple[float, str]) -> Stream:
    stream = Stream()
    for now, data in chunks:
        stream.take(now, data)
    return stream


def test_times_come_from_chunks_with_a_choice() -> None:
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
    whole = streamed(
        (0.5, json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})),
        (0.6, choice("a", [1])),
        (0.9, choice("b", [2, 3])),
        (1.5, usage),
        (1.6, "[DONE]"),
    )
    assert whole.error == ""
    assert whole.ttft == 0.5
    assert whole.itls == pytest.approx([0.1, 0.3])
    assert whole.latency == 0.9
    assert (whole.tokens, whole.text) == ([1, 2, 3], "ab")
    assert (whole.output_tokens, whole.prompt_tokens) == (3, 7)


def test_without_a_count_token_ids_or_chunks_are_counted() -> None:
    assert streamed((1, choice("a", [1, 2])), (2, "[DONE]")).output_tokens == 2
    assert streamed((1, choice("")), (2, choice("a")), (3, choice("b")), (4, "[DONE]")).output_tokens == 2


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([], "ended before its first token"),
        ([(1, "[DONE]")], "ended before its first token"),
        ([(1, choice("a"))], "ended in the middle"),
        (
            [(1, choice("a")), (2, '{"error": {"code": "peer_gone", "message": "no encoder"}}')],
            r"\[peer_gone\] no encoder",
        ),
        ([(1, choice("a")), (2, '{"error": "gone"}')], "gone"),
        ([(1, choice("a")), (2, choice("", finish_reason="error")), (3, "[DONE]")], "finish_reason error"),
        ([(1, choice("a")), (2, choice("", finish_reason="abort")), (3, "[DONE]")], "finish_reason abort"),
        ([(1, "{"), (2, "[DONE]")], "not JSON"),
        ([(1, "[1]"), (2, "[DONE]")], "not an object"),
    ],
)
def test_an_incomplete_answer_has_a_reason(chunks: list[tuple[float, str]], why: str) -> None:
    assert re.search(why, streamed(*chunks).error)


def test_the_token_ids_of_sglang_come_in_an_event_of_their_own() -> None:
    stream = streamed((1, choice("a")), (2, '{"choices": [], "sglext": {"output_ids": [[4, 5]]}}'), (3, "[DONE]"))
    assert (stream.tokens, stream.latency, stream.error) == ([4, 5], 1, "")


def test_only_a_line_feed_ends_a_line() -> None:
    text = 'data: {"a": "\u2028\u0085\r"}\n\ndata: [DONE]\r\n\n: a comment\n'.encode()
    for size in (1, 3, 1000):
        events = Events()
        got = [event for at in range(0, len(text), size) for event in events.feed(text[at : at + size])]
        assert got == ['{"a": "\u2028\u0085\r"}', "[DONE]"]
