"""Both workers of ours on the origin's wire, behind what SGLang's load balancer does."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable

import pytest

from tests.disaggregation.mooncake.origin_peers import BLOCK, BLOCKS
from tests.serve.origin.joined import eventually, post, run
from tests.serve.pictures import png

pytestmark = pytest.mark.integration


def picture(data: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def chat(question: str, *pictures: bytes) -> list[dict[str, object]]:
    return [{"role": "user", "content": [*map(picture, pictures), {"type": "text", "text": question}]}]


RED, BLUE = png(64, 64, "red"), png(64, 64, "blue")
LONG = (RED, BLUE, RED, png(640, 480, "green"))


@pytest.mark.parametrize("pictures", [(), (RED,), (RED, BLUE), LONG], ids=["text only", "one", "two", "twice the pool"])
def test_the_answer_is_that_of_the_undivided_model(workers, models, pictures):
    asked = chat("what colour is it?", *pictures)
    answer = run(workers.ask(asked))
    assert answer.text == models.answer(asked, *pictures)
    usage = answer.answered.json()["usage"]
    prompt, _ = models.prompt(asked, *pictures)
    assert usage["prompt_tokens"] == prompt.length == answer.encoded.json()["usage"]["prompt_tokens"]
    transfer, pool = answer.answered.json()["embferry"]["transfer"], BLOCKS * BLOCK
    assert transfer["initial"] + transfer["resumed"] == -(-prompt.length // pool)


def test_an_answer_may_be_streamed(workers, models):
    asked = chat("what colour is it?", RED)
    answer = run(workers.ask(asked, stream=True, stream_options={"include_usage": True}))
    assert answer.streamed == models.answer(asked, RED)
    assert '"usage":{"prompt_tokens":' in answer.answered.text


def test_requests_go_side_by_side_and_a_room_may_be_used_again(workers, models):
    asked = [chat(f"what colour is it{'?' * n}", *pictures) for n, pictures in enumerate([(RED,), (), (BLUE,), LONG])]

    async def all_of_them() -> list[str]:
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(workers.ask(each, room=room)) for room, each in enumerate(asked)]
        return [one.result().text for one in asking]

    wanted = [models.answer(each, *p) for each, p in zip(asked, [(RED,), (), (BLUE,), LONG], strict=True)]
    assert run(all_of_them()) == wanted
    assert run(all_of_them()) == wanted


def test_a_message_of_pictures_alone_reaches_the_language_worker_without_text(workers, models):
    asked = [{"role": "user", "content": [picture(RED)]}, *chat("what colour is it?")]
    assert run(workers.ask(asked)).text == models.answer(asked, RED)


def test_a_picture_that_cannot_be_read_is_refused_and_the_language_worker_aborted(workers):
    broken = chat("what is it?", RED[:60])
    fields = {"messages": broken} | workers.place(3)

    async def both() -> tuple[object, object]:
        answering = asyncio.create_task(post(workers.language_app, fields))
        encoded = await post(workers.encode_app, fields)
        await post(workers.language_app, {"rid": "rid-3"}, "/abort_request")
        return encoded, await answering

    encoded, answered = run(both())
    assert encoded.status_code == 400
    assert answered.json()["error"]["code"] == "aborted"


def test_a_caller_that_leaves_ends_its_room(workers):
    fields = {"messages": chat("what colour is it?", RED)} | workers.place(4)

    async def left(app: object, has_begun: Callable[[], bool]) -> None:
        asking = asyncio.create_task(post(app, fields))
        await asyncio.to_thread(eventually, has_begun)
        asking.cancel()
        await asyncio.wait({asking})

    run(left(workers.encode_app, lambda: bool(workers.encode.manager.handles)))
    eventually(lambda: workers.encode.load == 0)
    run(left(workers.language_app, lambda: bool(workers.language.manager.handles)))
    eventually(lambda: workers.language.load == 0)


WRONG = {
    "no room": ({"bootstrap_room": None}, "bootstrap_room"),
    "a list of rooms": ({"bootstrap_room": [1, 2]}, "bootstrap_room"),
    "a negative room": ({"bootstrap_room": -1}, "bootstrap_room"),
    "a room that is true": ({"bootstrap_room": True}, "bootstrap_room"),
    "a room too large": ({"bootstrap_room": 1 << 63}, "bootstrap_room"),
    "a host that is none": ({"bootstrap_host": "http://x/y"}, "bootstrap_host"),
    "a port that is none": ({"bootstrap_port": 70000}, "bootstrap_port"),
    "no messages": ({"messages": []}, "messages"),
    "tools": ({"tools": [1]}, "tools"),
}


@pytest.mark.parametrize(("change", "param"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("side", ["encode", "language"])
def test_a_wrong_request_is_refused_with_the_field(workers, side, change, param):
    fields = {"messages": chat("what?")} | workers.place(5) | change
    response = run(post(getattr(workers, f"{side}_app"), fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_language_worker_needs_the_bootstrap_server_and_an_encode_worker_does_not(workers):
    fields = {"messages": chat("what?"), "bootstrap_room": 6}
    response = run(post(workers.language_app, fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "bootstrap_host")


def test_a_room_in_use_is_refused_by_either_side(workers):
    fields = {"messages": chat("what?")} | workers.place(7)

    async def twice(app: object, has_begun: Callable[[], bool]) -> int:
        first = asyncio.create_task(post(app, fields))
        await asyncio.to_thread(eventually, has_begun)
        again = await post(app, fields)
        first.cancel()
        await asyncio.wait({first})
        return again.status_code

    assert run(twice(workers.encode_app, lambda: bool(workers.encode.manager.handles))) == 409
    eventually(lambda: workers.encode.load == 0)
    assert run(twice(workers.language_app, lambda: bool(workers.language.manager.handles))) >= 400
