"""Real instances of ``vllm serve`` that encode, prefill and decode, with NIXL between the last two."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.vllm.servers import CONDITION_S, GREEDY, MORE, START_S, Servers, picture, until, video
from tests.serve.vllm.stubs import text

pytestmark = [pytest.mark.vllm_http, pytest.mark.timeout(1800)]

INSTANCES = ("--prefills", "1", "--decodes", "1")
SMALL = ("--block-size", "32", "--max-model-len", "1024", "--num-gpu-blocks-override", "40")
"""Room for 1,280 tokens in each instance, less than four long answers need at once."""
LONG = 420
ALIAS = """
import importlib.util
__path__ = list(importlib.util.find_spec("nixl_cu12").submodule_search_locations)
"""
"""NIXL under the name by which vLLM imports it, for which the index has a package of its own."""
CONTENTS = {
    "a picture": [picture(1), text()],
    "two pictures": [picture(2), text("and"), picture(3, 448, 224), text()],
    "a video": [video(4, 4), text()],
    "a text": [text()],
}
VARIANTS: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 3},
    {"max_tokens": 1},
    {"extra_body": {"stop_token_ids": [*range(256)]}},  # at the first token
    {"temperature": 1.0, "seed": 3},
    {"n": 2, "temperature": 1.0, "seed": 3},
    {"extra_body": {"prompt_logprobs": 2}},
]
HELD_S = "600"
"""Seconds for which the router takes an instance that a test holds for alive."""
ANSWERED = "vllm:request_success_total"
FETCHED = "vllm:external_prefix_cache_hits_total"
"""Tokens of prompts that an instance has got from another one."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("stages")
    path = [os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("nixl") is None:
        (folder / "alias" / "nixl").mkdir(parents=True)
        (folder / "alias" / "nixl" / "__init__.py").write_text(ALIAS)
        path.insert(0, str(folder / "alias"))
    environ = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "EMBFERRY_ROUTER_STALL_TIMEOUT": HELD_S}
    started = Servers(folder, INSTANCES, SMALL, **environ)
    try:
        started.wait("ready:")
        started.wait("the undivided model", f"{started.undivided}/health")
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CONTENTS)
def test_the_tokens_are_those_of_the_undivided_model(servers: Servers, what: str, stream: bool) -> None:
    expected = servers.tokens(servers.undivided, *CONTENTS[what])
    assert len(expected) == 16
    taken, fetched = servers.computed_by("decode-0"), servers.metric("decode-0", FETCHED)
    assert servers.tokens(servers.url, *CONTENTS[what], stream=stream) == expected
    taken, fetched = servers.computed_by("decode-0") - taken, servers.metric("decode-0", FETCHED) - fetched
    assert taken == fetched > 0  # the whole prompt


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_answer_and_usage_are_those_of_the_undivided_model(servers: Servers, variant: dict[str, Any]) -> None:
    content = CONTENTS["two pictures"]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], **GREEDY, **variant}
    asked["extra_body"] = {**MORE, **asked.get("extra_body", {})}
    with servers.client(servers.url) as split, servers.client(servers.undivided) as undivided:
        ours, theirs = (client.chat.completions.create(**asked) for client in (split, undivided))
        assert ours.usage == theirs.usage
        assert ours.choices == theirs.choices
        assert getattr(ours, "prompt_logprobs", None) == getattr(theirs, "prompt_logprobs", None)
        if "prompt_logprobs" not in asked["extra_body"]:  # vLLM streams none
            chunks = list(split.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            assert chunks[-1].usage == theirs.usage


def test_a_preempted_request_gets_its_embeddings_again(servers: Servers) -> None:
    contents = [[picture(100 + number), text()] for number in range(3)] + [[video(110, 4), text()]]
    before = (
        servers.metric("decode-0", "vllm:num_preemptions_total"),
        servers.metric("decode-0", "embferry_connector_tokens"),
    )
    found = together(servers, [lambda content=content: long_answer(servers, content) for content in contents])
    assert found == [long_answer(servers, content, servers.undivided) for content in contents]
    assert servers.metric("decode-0", "vllm:num_preemptions_total") > before[0]
    assert servers.metric("decode-0", "embferry_connector_tokens_total") > before[1]


def test_a_prefill_instance_that_ends_before_its_blocks_are_fetched(servers: Servers) -> None:
    (error,) = together(servers, [lambda: failure(servers, CONTENTS["a picture"])], "prefill-0")
    assert (error.status_code, error.code) == (503, "no_worker"), error.body
    assert "no prefill instance " in error.body["message"]
    assert re.search(r"\(before that: .*the decode instance at \S+ failed with status 500", error.body["message"])
    is_answered_again(servers)


def test_a_decode_instance_that_ends(servers: Servers) -> None:
    import openai

    asked = {"model": "tiny", "messages": [{"role": "user", "content": CONTENTS["a picture"]}], "stream": True}
    with servers.client(servers.url) as client:
        answer = client.chat.completions.create(**asked, max_tokens=900, extra_body=MORE)
        first = next(iter(answer))
        assert first.choices
        (error,) = together(servers, [lambda: failure(servers, CONTENTS["two pictures"])], "decode-0")
        with pytest.raises(openai.APIError, match="the decode instance broke off"):
            list(answer)
    assert (error.status_code, error.code) == (503, "no_worker")
    assert "no decode instance " in error.body["message"]
    is_answered_again(servers)


def long_answer(servers: Servers, content: list[Any], url: str | None = None) -> list[int]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": LONG}
    with servers.client(url or servers.url) as client:
        (choice,) = client.chat.completions.create(**asked, extra_body=MORE).choices
    return list(choice.token_ids)


def failure(servers: Servers, content: list[Any]) -> Any:
    """Returns the error with which a request ends."""
    import openai

    with pytest.raises(openai.InternalServerError) as raised:
        servers.tokens(servers.url, *content)
    return raised.value


def together(servers: Servers, asks: list[Callable[[], Any]], killed: str | None = None) -> list[Any]:
    """Makes all requests, and has them reach the decode instance at the same time; ``killed`` is killed before."""
    with ThreadPoolExecutor(len(asks)) as pool:
        prefilled = servers.metric("prefill-0", ANSWERED)
        with servers.held("decode-0"):
            asked = [pool.submit(ask) for ask in asks]
            until(lambda: servers.metric("prefill-0", ANSWERED) == prefilled + len(asks))
            if killed is not None:
                servers.kill(killed)
            if killed == "decode-0":
                return [one.result(CONDITION_S) for one in asked]
        return [one.result(CONDITION_S) for one in asked]


def is_answered_again(servers: Servers) -> None:
    """Asserts that requests are answered once what has ended is here again."""
    import openai

    answers: list[Any] = []
    deadline = time.monotonic() + START_S
    while not answers:
        assert time.monotonic() < deadline
        with contextlib.suppress(openai.InternalServerError):
            answers = [servers.tokens(servers.url, *CONTENTS["a picture"], stream=stream) for stream in (False, True)]
        time.sleep(0.2)
    assert answers == [servers.tokens(servers.undivided, *CONTENTS["a picture"])] * 2
