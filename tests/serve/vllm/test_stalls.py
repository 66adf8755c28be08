"""Instances that stall behind the router: they are passed over, or their stream ends with an error."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.vllm.stubs import (
    DONE,
    HOLD,
    ROLE,
    encoder_stubs,
    events_of,
    held,
    language_stubs,
    picture,
    request,
    routed,
    streamed,
    text,
    until,
)

pytestmark = pytest.mark.asyncio


async def test_an_encoder_that_stalls_is_passed_over() -> None:
    """It has taken the request and answers probes no more; a slow one that does is waited for."""
    encoders, (language,) = encoder_stubs(2), language_stubs(1)
    async with routed(*encoders, language) as router:
        for encoder in encoders:
            encoder.behaviours = [held]
        call = router.call(request(picture()))
        await until(lambda: any(encoder.holding for encoder in encoders))
        (stalled,) = (encoder for encoder in encoders if encoder.holding)
        (other,) = (encoder for encoder in encoders if not encoder.holding)
        other.behaviours = []
        stalled.silent = True
        assert (await call.answer()).status == 200
        assert len(other.requests) == 1
        assert stalled.left == 1


@pytest.mark.parametrize("content", [(picture(),), (text(),)], ids=["picture", "text"])
async def test_a_language_instance_that_stalls_before_its_first_token_is_passed_over(content: Any) -> None:
    (encoder,), languages = encoder_stubs(1), language_stubs(2)
    async with routed(encoder, *languages) as router:
        for language in languages:
            language.behaviours = [streamed(ROLE, HOLD)]
        call = router.call(request(*content, stream=True))
        await until(lambda: any(language.holding for language in languages))
        (stalled,) = (language for language in languages if language.holding)
        (other,) = (language for language in languages if not language.holding)
        other.behaviours = []
        stalled.silent = True
        answer = await call.answer()
        assert (answer.status, answer.body.endswith(DONE)) == (200, True)
        assert len(other.requests) == 1
        assert stalled.left == 1


async def test_a_stream_whose_instance_stalls_ends_with_an_error() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        language.behaviours = [streamed(*events_of("a red")[:-2], HOLD)]
        call = router.call(request(picture(), text(), stream=True))
        await until(lambda: language.holding)
        await call.until(lambda: b"red" in call.body)
        language.silent = True
        answer = await call.answer()
        assert b'"code":"worker_failed"' in answer.body
        assert b"router.stall_timeout" in answer.body
        assert language.left == 1
