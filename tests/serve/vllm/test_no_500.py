"""No request that a client can write makes the router before vLLM fail. The stubs take everything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given

from tests.serve.odd_requests import EXAMPLES, RAW, URLS, WHOLE, changed, check, without_network
from tests.serve.vllm.stage_stubs import prefilled
from tests.serve.vllm.stubs import Answer, Stub, routed

TWO = (Stub("e", "encode"), Stub("l", "language"))
THREE = (Stub("e", "encode"), Stub("p", "prefill", default=prefilled()), Stub("d", "decode"))


@pytest.fixture(params=[TWO, THREE], ids=["two stages", "three stages"])
def asked(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that posts a body to the router, where media may come from any host, of which none is found."""
    with without_network(), asyncio.Runner() as runner:
        context = routed(*request.param, media={"allowed_hosts": ("*",)})
        router = runner.run(context.__aenter__())

        async def post(path: str, content: bytes) -> Answer:
            return await router.call(content, path).answer()

        yield lambda path, content: runner.run(post(path, content))
        runner.run(context.__aexit__(None, None, None))


@EXAMPLES
@given(changed())
def test_a_changed_request_is_answered_or_refused(asked: Any, sent: tuple[str, bytes]) -> None:
    path, body = sent
    if body:  # the stubs' router takes a call without a body for GET
        answer = asked(path, body)
        check(answer.status, answer.body)


@pytest.mark.parametrize("body", [one for one in RAW if one], ids=repr)
@pytest.mark.parametrize("path", WHOLE)
def test_a_body_that_is_no_request_is_refused(asked: Any, path: str, body: bytes) -> None:
    answer = asked(path, body)
    check(answer.status, answer.body)


@pytest.mark.parametrize("url", URLS, ids=lambda url: url[:20].encode("ascii", "backslashreplace").decode())
@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
def test_a_url_that_is_none_is_refused(asked: Any, kind: str, url: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}
    answer = asked("/v1/chat/completions", json.dumps(body).encode())
    check(answer.status, answer.body)
    assert answer.status in (400, 403) or url.startswith("data:")  # which an instance reads
