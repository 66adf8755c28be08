"""Answers across two workers are, token by token, those of the undivided model."""

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
def test_as_undivided_through_a_pool_far_smaller(join: MakeJoined, transport: type[Transport], case: str) -> None:
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


def test_text_alone_needs_no_room(join: MakeJoined) -> None:
    joined = join()
    answer = run(joined.ask("how are you?"))
    assert answer.tokens == joined.reference("how are you?")
    assert answer.last["transfer"] is None
    usage = answer.last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(answer.tokens)


def test_many_at_once_through_one_block(join: MakeJoined) -> None:
    joined = join(num_blocks=1, block_size=5)
    asked = [
        ("what is there?", PICTURE),
        ("which colour?", OTHER),
        ("what moves?", FRAMES),
        ("and here?", OTHER, PICTURE),
    ]
    asked *= 6

    async def all_of_them() -> list[list[int]]:
        answers = await asyncio.gather(*(joined.ask(*one) for one in asked))
        return [answer.tokens for answer in answers]

    expected = [joined.reference(*one) for one in asked[:4]] * 6
    assert run(all_of_them()) == expected


def test_the_same_picture_is_encoded_once(join: MakeJoined) -> None:
    joined = join()
    first, second = run(joined.ask("what?", PICTURE)), run(joined.ask("what?", PICTURE))
    assert first.tokens == second.tokens
    counters = joined.encode.cache.counters
    assert (counters.misses, counters.hits) == (1, 1)


def test_what_encode_answers_is_what_the_language_side_needs(join: MakeJoined) -> None:
    joined = join()
    response = run(joined.post_encode(PICTURE, FRAMES, room=77))
    told = response.json()
    assert told["room"] == 77
    assert told["endpoint"] == joined.encode.manager.endpoint
    assert [item["kind"] for item in told["items"]] == ["image", "video"]
    assert told["total_tokens"] == sum(item["num_tokens"] for item in told["items"])
    assert len(told["items"][1]["timestamps"]) == told["items"][1]["grid_thw"][0]
    assert joined.encode.cache.counters.misses == 0  # nobody has asked for it yet
    assert joined.encode.abort_room(77)
