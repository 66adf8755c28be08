"""Completions across two workers equal those of the undivided model, token by token."""

from __future__ import annotations

import asyncio

import pytest

from embferry.transports.contract import Transport
from tests.serve.pictures import encoded, noise, png, video
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}
OTHER = {"kind": "image", "data": png(80, 80, "blue")}
FRAMES = {"kind": "video", "frames": [png(64, 64, colour) for colour in ("red", "green", "blue", "white")], "fps": 2.0}
FILE = {"kind": "video", "data": video(20)}

CASES = {
    "one picture": [PICTURE],
    "three pictures": [PICTURE, OTHER, PICTURE],
    "frames": [FRAMES],
    "picture and video file": [OTHER, FILE],
}


@pytest.mark.parametrize("case", CASES)
def test_answers_through_a_small_pool_equal_those_of_the_undivided_model(
    join: MakeJoined, transport: type[Transport], case: str
) -> None:
    items = CASES[case]
    joined = join(transport, num_blocks=2, block_size=3)
    answer = run(joined.ask("what is there?", *items))
    assert answer.status == 200
    assert answer.last["type"] == "end", answer.last
    assert answer.tokens == joined.reference("what is there?", *items)
    transfer = answer.last["transfer"]
    pool = 2 * 3
    assert transfer["total_tokens"] > 2 * pool
    assert transfer["initial"] == 1
    assert transfer["resumed"] >= transfer["total_tokens"] // pool
    assert transfer["transport"] == transport.name
    token_bytes = joined.language.manager.geometry.layout.token_bytes
    assert transfer["bytes"] == transfer["total_tokens"] * token_bytes


def test_an_embedding_that_arrives_at_once_between_two_looks_is_answered(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine thread looks for embeddings that begin to arrive, then for those that have arrived."""
    joined = join()
    monkeypatch.setattr(joined.language._pipeline.transfer_queue, "pop_arriving", list)
    answer = run(joined.ask("what is there?", OTHER))
    assert answer.tokens == joined.reference("what is there?", OTHER)


def test_text_alone_needs_no_transfer(join: MakeJoined) -> None:
    joined = join()
    answer = run(joined.ask("how are you?"))
    assert answer.tokens == joined.reference("how are you?")
    assert answer.last["transfer"] is None
    usage = answer.last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(answer.tokens)


def test_concurrent_requests_through_one_block_get_correct_answers(join: MakeJoined) -> None:
    joined = join(num_blocks=1, block_size=5)
    requests = [
        ("what is there?", PICTURE),
        ("which colour?", OTHER),
        ("what moves?", FRAMES),
        ("and here?", OTHER, PICTURE),
    ]
    requests *= 6

    async def all_of_them() -> list[list[int]]:
        answers = await asyncio.gather(*(joined.ask(*request) for request in requests))
        return [answer.tokens for answer in answers]

    expected = [joined.reference(*request) for request in requests[:4]] * 6
    assert run(all_of_them()) == expected


def test_the_same_picture_is_encoded_once(join: MakeJoined) -> None:
    joined = join()
    first, second = run(joined.ask("what?", PICTURE)), run(joined.ask("what?", PICTURE))
    assert first.tokens == second.tokens
    counters = joined.encode.cache.counters
    assert (counters.misses, counters.hits) == (1, 1)


def test_the_encode_response_has_all_that_the_language_side_needs(join: MakeJoined) -> None:
    joined = join()
    response = run(joined.post_encode(PICTURE, FRAMES, room=77))
    body = response.json()
    assert body["room"] == 77
    assert body["endpoint"] == joined.encode.manager.endpoint
    assert [item["kind"] for item in body["items"]] == ["image", "video"]
    assert body["total_tokens"] == sum(item["num_tokens"] for item in body["items"])
    assert len(body["items"][1]["timestamps"]) == body["items"][1]["grid_thw"][0]
    assert joined.encode.cache.counters.misses == 0  # the encoder has not run: no language worker has asked yet
    assert joined.encode.abort_room(77)
