"""A long text is refused by its size, before any instance gets it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from embferry.serve.vllm.media_parts import media_parts
from embferry.serve.vllm.texts import characters_of
from tests.serve.vllm.stubs import Network, Stub, picture, request, routed, text, video

pytestmark = pytest.mark.asyncio


def characters(**fields: Any) -> int:
    """Returns how many characters these fields add to a request."""
    whole, without = request(text(), **fields), request(text())
    return characters_of(whole, media_parts(whole)) - characters_of(without, media_parts(without))


async def test_texts_count_wherever_they_stand() -> None:
    assert characters(chat_template="x" * 100) == len("chat_template") + 100
    assert characters(tools=[{"function": {"name": "f", "description": "x" * 100}}]) > 100
    assert characters(documents=[{"x" * 100: 1}]) > 100
    assert characters(tools=[{"image_url": "x" * 100}]) > 100


@pytest.mark.parametrize(
    "part",
    [
        picture(b"x" * 10_000),
        {"image_url": "data:," + "x" * 10_000},
        video(b"x" * 10_000),
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + "A" * 10_000}},
        {"type": "input_audio", "input_audio": {"data": "A" * 10_000, "format": "wav"}},
    ],
)
async def test_files_are_no_texts(part: dict[str, Any]) -> None:
    asked = request(part, text())
    assert characters_of(asked, media_parts(asked)) < 500


async def test_malformed_messages_are_counted_too() -> None:
    for messages in ("x" * 100, ["x" * 100, None], [{"content": "x" * 100}, {"content": [5, "x"]}]):
        asked = {"messages": messages}
        assert characters_of(asked, media_parts(asked)) >= 100


class Described(Network):
    """Instances that say how many tokens their model takes, as ``vllm serve`` does."""

    def __init__(self, *stubs: Stub, tokens: Any) -> None:
        super().__init__(*stubs)
        self._tokens = tokens

    async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
        if asked.url.path != "/v1/models":
            return await super().handle_async_request(asked)
        return httpx.Response(200, request=asked, json={"data": [{"id": "tiny", "max_model_len": self._tokens}]})


@pytest.mark.parametrize("content", [(), (picture(),)], ids=["text alone", "with a picture"])
@pytest.mark.parametrize(
    ("limits", "tokens", "most"),
    [
        ({"max_prompt_characters": 500}, 100, 500),
        ({}, 100, 1600),
        ({}, 1_000_000, 16_000_000),
        ({"max_prompt_tokens": 50}, None, 800),
        ({"max_prompt_tokens": 50}, "many", 800),
    ],
)
async def test_a_long_text_is_refused(limits: dict[str, int], tokens: Any, most: int, content: Any) -> None:
    stubs = Stub("enc", "encode"), Stub("lang", "language")
    async with routed(*stubs, network=Described(*stubs, tokens=tokens), language=limits) as router:
        asked = request(text(""), *content)
        short = most - characters_of(asked, media_parts(asked))
        assert (await router.ask(request(text("x" * short), *content))).status == 200
        for stub in stubs:
            stub.requests.clear()
        answer = await router.ask(request(text("x" * (short + 1)), *content))
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert f"{most:,} (language.max_prompt_characters)" in answer.error["message"]
        assert [stub.requests for stub in stubs] == [[], []]
