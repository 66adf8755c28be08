"""Messages are read as OpenAI's API and vLLM read them."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.openai.ignored import MAX_NAMED, Ignored
from embferry.serve.openai.messages import Media, parse_messages
from embferry.serve.openai.tool_calls import MAX_ARGUMENTS

URL = "data:image/png;base64,AAAA"
TEXT = {"type": "text", "text": "hi"}


def read(*messages: Any) -> tuple[list[dict[str, Any]], list[Media], str]:
    """Returns the messages for the worker, their media, and the fields without effect."""
    ignored = Ignored()
    return *parse_messages(list(messages), ignored), str(ignored)


def part(value: Any) -> tuple[list[dict[str, Any]], list[Media], str]:
    """Reads one part of a user message."""
    messages, media, ignored = read({"role": "user", "content": [value]})
    return messages[0]["parts"], media, ignored


def refusal(*messages: Any) -> tuple[str, str | None]:
    with pytest.raises(ServeError) as caught:
        read(*messages)
    return caught.value.code, caught.value.param


PARTS = {
    "text": "text",
    "input_text": "text",
    "thinking": "thinking",
    "image_url": "image_url",
    "input_image": "image_url",
    "video": "video",
}
CONTENTS = ("text", "refusal", "thinking", "image_url", "image", "video_url", "video")


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("other", CONTENTS)
def test_a_part_has_one_content(kind: str, other: str) -> None:
    """A second one would be dropped, and the question be another."""
    own = PARTS[kind]
    if other == own:
        return
    given = {"type": kind, own: URL}
    at = f"messages[0].content[0].{other}"
    assert refusal({"role": "user", "content": [given | {other: "x"}]}) == ("invalid_request", at)
    for empty in (None, "", [], {}):
        assert part(given | {other: empty})[2] == ""


def test_fields_of_parts_without_effect_are_named() -> None:
    at = "messages[0].content[0]"
    assert part(TEXT | {"fps": 2, "file_id": "f"})[2] == f"{at}.fps, {at}.file_id"
    assert part({"type": "image_url", "image_url": {"url": URL, "fps": 2}})[2] == f"{at}.image_url.fps"
    assert part({"type": "image_url", "image_url": URL, "fps": 2})[2] == f"{at}.fps"
    assert part({"type": "video_url", "video_url": {"url": URL, "fps": 2}})[2] == ""


def test_fields_of_other_roles_are_named() -> None:
    user = {"role": "user", "content": "?", "reasoning": "r", "reasoning_content": "r", "tool_call_id": "c"}
    assert read(user)[2] == "messages[0].reasoning, messages[0].reasoning_content, messages[0].tool_call_id"
    both = {"role": "assistant", "content": "!", "reasoning": "a", "reasoning_content": "b"}
    assert read(both)[2] == "messages[0].reasoning_content"
    assert read(both | {"reasoning_content": "a"})[2] == ""


def test_fields_of_calls_without_effect_are_named() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}, "index": 0, "y": 1}
    message = {"role": "assistant", "tool_calls": [call], "function_call": {"name": "g", "arguments": "{}"}}
    at = "messages[0]"
    assert read(message)[2] == f"{at}.function_call, {at}.tool_calls[0].y, {at}.tool_calls[0].function.x"


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "left"}'}}
READ_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"where": "left"}}}


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": []}], ids=["null", "missing", "empty list"])
def test_an_assistant_without_content(content: dict[str, Any]) -> None:
    messages, _, ignored = read({"role": "assistant", "tool_calls": [CALL], **content})
    assert messages == [{"role": "assistant", "parts": [], "tool_calls": [READ_CALL]}]
    assert not ignored


def test_a_history_with_tool_calls_and_the_picture_that_a_tool_returned() -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": [TEXT, {"type": "image_url", "image_url": URL}]}
    messages, media, ignored = read(
        {"role": "user", "content": "look left"},
        {"role": "assistant", "content": "looking", "tool_calls": [CALL], "refusal": None, "annotations": []},
        answer,
        {"role": "tool", "tool_call_id": "call_2", "content": "done", "name": "look"},
    )
    assert messages[1] == {
        "role": "assistant",
        "parts": [{"type": "text", "text": "looking"}],
        "tool_calls": [READ_CALL],
    }
    assert messages[2]["tool_call_id"] == "call_1"
    assert messages[2]["parts"] == [TEXT, {"type": "image", "item": 0}]
    assert messages[3] == {
        "role": "tool",
        "parts": [{"type": "text", "text": "done"}],
        "name": "look",
        "tool_call_id": "call_2",
    }
    assert [(one.kind, one.param) for one in media] == [("image", "messages[2].content[1]")]
    assert not ignored


def test_the_earlier_form_of_a_call() -> None:
    messages, _, _ = read(
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}},
        {"role": "function", "name": "look", "content": "seen"},
    )
    assert messages[0]["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    assert messages[1] == {"role": "tool", "parts": [{"type": "text", "text": "seen"}], "name": "look"}


@pytest.mark.parametrize(
    ("arguments", "read_as", "is_ignored"),
    [
        ("", {}, False),
        (None, {}, False),
        ({"a": 1}, {"a": 1}, False),
        ("{not json", {}, True),
        ("[1]", {}, True),
        ('{"a": "\\ud800"}', {}, True),
    ],
)
def test_arguments_of_a_call(arguments: Any, read_as: dict[str, Any], is_ignored: bool) -> None:
    """As vLLM does: a call that the chat template cannot show must not end the conversation."""
    call = {"function": {"name": "look", "arguments": arguments}}
    messages, _, ignored = read({"role": "assistant", "content": None, "tool_calls": [call]})
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == read_as
    assert ignored == ("messages[0].tool_calls[0].function.arguments" if is_ignored else "")


def test_arguments_are_bounded() -> None:
    def with_arguments(arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    at = "messages[0].tool_calls[0].function.arguments"
    assert refusal(with_arguments('"' + "x" * MAX_ARGUMENTS + '"')) == ("context_length_exceeded", at)
    assert refusal(with_arguments({"a": [[]]} | {"b": eval("[" * 70 + "]" * 70)})) == ("invalid_request", at)  # noqa: S307
    assert refusal(with_arguments("[" * 300_000)) == ("invalid_json", None)


@pytest.mark.parametrize(
    ("role", "becomes"),
    [("developer", "system"), ("system", "system"), ("user", "user"), ("tool", "tool"), ("function", "tool")],
)
def test_roles(role: str, becomes: str) -> None:
    messages, _, _ = read({"role": role, "content": "x"})
    assert messages[0]["role"] == becomes


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("plain", "plain"),
        ({"text": "no type"}, "no type"),
        ({"type": None, "text": "null type"}, "null type"),
        ({"type": "input_text", "text": "responses"}, "responses"),
        ({"type": "output_text", "text": "an answer", "annotations": []}, "an answer"),
        ({"type": "refusal", "refusal": "no"}, "no"),
        ({"type": "thinking", "thinking": "hm"}, "hm"),
    ],
)
def test_parts_that_are_text(given: Any, text: str) -> None:
    assert part(given) == ([{"type": "text", "text": text}], [], "")


@pytest.mark.parametrize(
    "given",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        {"type": "image_url", "image_url": URL},
        {"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None},
        {"type": "input_image", "image_url": {"url": URL}},
        {"type": "image", "image": URL},
        {"image_url": {"url": URL}},
        {"image": URL},
    ],
)
def test_parts_that_are_a_picture(given: Any) -> None:
    parts, media, ignored = part(given)
    assert parts == [{"type": "image", "item": 0}]
    assert [(one.kind, one.urls) for one in media] == [("image", (URL,))]
    assert not ignored


@pytest.mark.parametrize(
    "given", [{"video_url": {"url": URL}}, {"video": [URL]}, {"type": "video_url", "video_url": URL}]
)
def test_parts_that_are_a_video(given: Any) -> None:
    _, media, _ = part(given)
    assert [(one.kind, one.urls) for one in media] == [("video", (URL,))]


FPS_THAT_ARE_NONE = [10**400, -1, 0, 5e-324, 1e-300, 0.0009, 240.5, 241, float("nan"), float("inf"), True, "2"]


@pytest.mark.parametrize("fps", FPS_THAT_ARE_NONE)
def test_frame_rates_that_there_are_not(fps: Any) -> None:
    """One of 400 digits has no float, and with a tiny one the times of frames would have hundreds."""
    for video in ({"video": [URL]}, {"video": URL}, {"video": {"url": [URL], "fps": fps}}):
        asked = {"role": "user", "content": [{"type": "video", "fps": fps, **video}]}
        assert refusal(asked) == ("invalid_request", "messages[0].content[0].fps")


@pytest.mark.parametrize("fps", [0.001, 0.5, 2, 240])
def test_frame_rates_that_there_are(fps: float) -> None:
    assert part({"type": "video", "video": [URL], "fps": fps})[1][0].fps == fps


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "messages[0].content[0].image_url.detail"),
        ({"type": "image", "image": URL, "min_pixels": 5}, "messages[0].content[0].min_pixels"),
        ({"type": "image", "image": URL, "fps": 5}, "messages[0].content[0].fps"),
        ({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, "messages[0].content[0].cache_control"),
    ],
)
def test_fields_of_a_part_without_effect_are_named(given: Any, at: str) -> None:
    assert part(given)[2] == at


def test_the_fields_that_are_named_are_few_and_plain() -> None:
    fields = {f"field {n}\n\u2028ü": n for n in range(100)}
    ignored = read({"role": "user", "content": "x", **fields})[2]
    assert ignored.count(",") == MAX_NAMED
    assert ignored.endswith(f"{100 - MAX_NAMED} more")
    assert ignored.isascii()
    assert ignored.isprintable()
    assert len(read({"role": "user", "content": "x", "y" * 10_000: 1})[2]) < 200


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "role": ({"role": "narrator", "content": "x"}, "unsupported_value", "role"),
    "user without content": ({"role": "user", "content": None}, "invalid_request", "content"),
    "sound of the assistant": ({"role": "assistant", "audio": {"id": "1"}}, "unsupported_value", "audio"),
    "tools of a developer": ({"role": "developer", "content": "x", "tools": [{}]}, "unsupported_value", "tools"),
    "calls that are no list": ({"role": "assistant", "tool_calls": {"0": CALL}}, "invalid_request", "tool_calls"),
    "calls of a user": ({"role": "user", "content": "x", "tool_calls": [CALL]}, "invalid_request", "tool_calls"),
    "calls that are a zero": ({"role": "assistant", "tool_calls": 0}, "invalid_request", "tool_calls"),
    "calls of a user that are a zero": (
        {"role": "user", "content": "x", "tool_calls": 0},
        "invalid_request",
        "tool_calls",
    ),
    "an earlier call that is false": (
        {"role": "assistant", "function_call": False},
        "invalid_request",
        "function_call",
    ),
    "sound that is a zero": ({"role": "user", "content": "x", "audio": 0}, "unsupported_value", "audio"),
    "tools that are false": ({"role": "user", "content": "x", "tools": False}, "unsupported_value", "tools"),
    "custom tool": ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "invalid_request", "tool_calls[0]"),
    "two untyped": ({"role": "user", "content": [{"text": "a", "image": URL}]}, "unsupported_value", "content[0].type"),
    "sound": ({"role": "user", "content": [{"type": "input_audio"}]}, "unsupported_value", "content[0].type"),
    "stored file": (
        {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]},
        "unsupported_value",
        "content[0].file_id",
    ),
    "picture of a system": ({"role": "system", "content": [{"image": URL}]}, "unsupported_value", "content"),
    "name": ({"role": "user", "content": "x", "name": 5}, "invalid_request", "name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    message, code, field = WRONG[name]
    assert refusal(message) == (code, f"messages[0].{field}")
