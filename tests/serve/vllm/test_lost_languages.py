"""Language instances that are lost while they have a request: another one takes it, and no encoder is asked again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.vllm.losses import damaged, ends
from tests.serve.vllm.stubs import (
    BREAK,
    ROLE,
    encoder_stubs,
    language_stubs,
    picture,
    request,
    routed,
    streamed,
    text,
)

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["lost", "damaged", "lost in a stream"])
async def test_a_lost_language_instance_costs_no_encode(how: str, stream: bool) -> None:
    """The other one gets the same coordinates. No encoder is suspected, avoided or even asked."""
    encoders, languages = encoder_stubs(2), language_stubs(2)
    behaviour = {"lost": ends, "damaged": damaged, "lost in a stream": streamed(ROLE, BREAK)}[how]
    stream = stream or how == "lost in a stream"
    async with routed(*encoders, *languages) as router:
        first = [behaviour] * (2 if how == "damaged" else 1)  # a damaged message is sent once more
        languages[0].behaviours = languages[1].behaviours = shared = first
        answer = await router.ask(request(picture(), text(), stream=stream))
        assert answer.status == 200
        assert shared == []
        assert await router.counted("chat_second_attempts_total") == 1
        assert await router.counted("encodes_total") == 1
        bodies = [body for language in languages for body in language.requests]
        places = {json.dumps(body["ec_transfer_params"], sort_keys=True) for body in bodies}
    assert all(language.requests for language in languages)
    assert len(places) == 1
    assert sum(len(encoder.requests) for encoder in encoders) == 1


@pytest.mark.parametrize("language_encodes", [False, True])
@pytest.mark.parametrize("content", [[picture(), text()], [text()]], ids=["picture", "text"])
async def test_a_request_that_ends_instances_ends_two(content: list[Any], language_encodes: bool) -> None:
    encoders, languages = encoder_stubs(2), language_stubs(4)
    for language in languages:
        language.default = ends
    async with routed(*encoders, *languages, language_encodes=language_encodes) as router:
        answer = await router.ask(request(*content))
        assert await router.counted("chat_second_attempts_total") == 1
    assert (answer.status, answer.error["code"]) == (502, "worker_failed")
    assert "before that" in answer.error["message"]
    assert answer.headers["retry-after"] == "1"
    assert [language.up for language in languages].count(False) == 2


async def test_the_only_language_instance_that_ends_is_an_error_at_once() -> None:
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language) as router:
        language.behaviours = [ends]
        answer = await router.ask(request(picture(), text()))
        assert answer.status == 503
        assert (answer.error["code"], answer.headers["retry-after"]) == ("no_worker", "1")
        refused_now = await router.ask(request(picture(b"another"), text()))
        assert (refused_now.status, refused_now.error["code"]) == (503, "no_worker")
        counts = sorted(len(encoder.requests) for encoder in encoders)
        assert counts == [0, 1], "no encode for a request that no instance can take"
        language.up = True
        assert (await router.ask(request(picture(), text()))).status == 200
