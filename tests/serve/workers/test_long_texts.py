"""A long text is refused before it is tokenized, and delays no other request while it is."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.engine.errors import PromptTooLong
from embferry.engine.prompt import PromptBuilder
from embferry.serve.config import LanguageSettings
from embferry.serve.encode import messages
from embferry.serve.errors import ServeError
from embferry.serve.language.messages import GenerateRequest, Message, Part
from embferry.serve.language.prompting import LONG_CHARACTERS, LONG_COUNT, PromptThreads
from embferry.serve.worker.errors import decoded
from tests.serve.blocking import DEADLINE, Blocking
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import events, generate_body, run

LONG = "word " * LONG_CHARACTERS


def test_a_long_text_is_refused_before_it_is_tokenized(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join()
    limit = 16 * joined.models.language.prompts.limit
    monkeypatch.setattr(PromptBuilder, "build", lambda *_: pytest.fail("tokenized"))
    response = run(joined.post_generate(generate_body({"items": []}, "n" * limit)))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert f"{limit:,}" in response.json()["error"]["message"]
    assert joined.language.load == 0


def test_an_item_of_millions_of_frames_is_refused_before_they_are_made() -> None:
    item = b"\x82\xa4kind\xa5video\xa6frames\xdd" + (1 << 24).to_bytes(4) + b"\xc4\x00" * (1 << 24)
    body = b"\x83\xa4room\x01\xaarequest_id\xa1x\xa5items\x91" + item
    with pytest.raises(ServeError, match="65536"):
        decoded(messages.DECODER, body)


def test_the_limit_follows_from_the_tokens_unless_it_is_set() -> None:
    assert LanguageSettings(max_prompt_tokens=100).prompt_characters == 1600
    assert LanguageSettings(max_prompt_tokens=100, max_prompt_characters=7).prompt_characters == 7


NO_GRAMMARS: Any = SimpleNamespace(vocabulary=1)


def request_of(messages: int, parts: int, text: str = "") -> GenerateRequest:
    return GenerateRequest("x", [Message("user", [Part("text", text)] * parts)] * messages)


@pytest.mark.parametrize("limit", ["of the model", "of the settings"])
def test_more_messages_than_fit_are_refused_before_a_prompt_is_built(limit: str) -> None:
    """Without any text: each message takes as long as one, and 80,000 of them take seconds."""
    prompts: Any = SimpleNamespace(
        limit=90 if limit == "of the model" else 10_000, build=lambda *_: pytest.fail("built")
    )
    settings = LanguageSettings(max_prompt_tokens=90 if limit == "of the settings" else 10_000)
    threads = PromptThreads(prompts, NO_GRAMMARS, settings, 1)
    with pytest.raises(PromptTooLong, match="at least 93 tokens; the limit is 90"):
        threads.build(request_of(31, 1))
    threads.close()


@pytest.mark.parametrize(
    ("request_", "is_long"),
    [
        (request_of(1, 1), False),
        (request_of(1, 1, LONG), True),
        (request_of(1, LONG_COUNT), True),
        (request_of(LONG_COUNT, 0), False),
        (request_of(LONG_COUNT, 1), True),
    ],
    ids=["short", "long", "many parts", "as many messages as are short", "many messages"],
)
def test_many_messages_or_parts_go_to_the_thread_for_long_texts(
    monkeypatch: pytest.MonkeyPatch, request_: GenerateRequest, is_long: bool
) -> None:
    monkeypatch.setattr(PromptThreads, "build", lambda self, request: threading.current_thread().name)
    threads = PromptThreads(SimpleNamespace(), NO_GRAMMARS, LanguageSettings(), 1)  # type: ignore[arg-type]
    name: Any = threads.submit(request_, lambda future: None).result(DEADLINE)
    assert name.startswith("long-prompt") == is_long
    threads.close()


@pytest.fixture
def blocking(monkeypatch: pytest.MonkeyPatch) -> Blocking:
    """Blocks the building of long prompts."""
    build = PromptThreads.build
    blocked = Blocking(build)

    def choose(threads: PromptThreads, request: GenerateRequest) -> Any:
        return (blocked if request.characters > LONG_CHARACTERS else build)(threads, request)

    monkeypatch.setattr(PromptThreads, "build", choose)
    return blocked


def test_the_engine_and_short_prompts_go_on_while_a_long_one_is_tokenized(join: MakeJoined, blocking: Blocking) -> None:
    joined = join()

    async def both() -> tuple[Any, Any]:
        long = asyncio.create_task(joined.post_generate(generate_body({"items": []}, LONG)))
        assert await asyncio.to_thread(blocking.called.wait, DEADLINE)
        short = await joined.post_generate(generate_body({"items": []}, "hello"))
        assert not long.done()
        blocking.release.set()
        return await long, short

    long, short = run(both())
    assert events(short)[-1]["type"] == "end"
    assert long.status_code in (200, 400)


def test_a_job_that_is_aborted_while_its_prompt_is_built_does_not_begin(join: MakeJoined, blocking: Blocking) -> None:
    joined = join()

    async def left() -> None:
        asking = asyncio.create_task(joined.post_generate(generate_body({"items": []}, LONG)))
        assert await asyncio.to_thread(blocking.called.wait, DEADLINE)
        queued = asyncio.create_task(joined.post_generate(generate_body({"items": []}, LONG)))
        while joined.language.load < 2:
            await asyncio.sleep(0)
        for task in (asking, queued):
            task.cancel()
        await asyncio.wait({asking, queued})
        while joined.language.load:
            await asyncio.sleep(0)

    run(left())
    blocking.release.set()
    answer = run(joined.post_generate(generate_body({"items": []}, "hello")))
    assert events(answer)[-1]["type"] == "end"


def test_a_prompt_waits_for_none_of_those_whose_clients_have_left(join: MakeJoined, blocking: Blocking) -> None:
    joined, leavers = join(), 6
    threads = joined.language._pipeline.prompts._long

    async def asked() -> Any:
        leaving = [asyncio.create_task(joined.post_generate(body("leaver"))) for _ in range(leavers)]
        while threads.waiting < leavers - 1 or not blocking.calls:
            await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        while threads.waiting:
            await asyncio.sleep(0)
        stayer = asyncio.create_task(joined.post_generate(body("stayer")))
        while not threads.waiting:
            await asyncio.sleep(0)
        blocking.release.set()
        return await stayer

    assert run(asked()).status_code in (200, 400)
    assert blocking.calls == 2


def test_the_prompts_of_a_client_wait_in_a_queue_of_its_own(join: MakeJoined, blocking: Blocking) -> None:
    joined = join()
    threads = joined.language._pipeline.prompts._long

    async def asked() -> None:
        asking = [asyncio.create_task(joined.post_generate(body(client))) for client in ("a", "a", "a", "b")]
        while threads.waiting < len(asking) - 1:
            await asyncio.sleep(0)
        assert set(threads._waiting) == {"a", "b"}
        blocking.release.set()
        await asyncio.wait(asking)

    run(asked())


def body(client: str) -> dict[str, Any]:
    return generate_body({"items": []}, LONG) | {"client": client}
