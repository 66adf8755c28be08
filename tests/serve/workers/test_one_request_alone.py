"""A fault in one request ends that request; a worker's thread, its other requests and its process go on."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from embferry.protocol.errors import TransportError
from embferry.protocol.messages import MAX_TOKENS, Frame, Open
from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.serve.language import process as language_process
from embferry.serve.language.job import ACCEPTED, Job
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.pipeline import JobPipeline
from embferry.serve.language.prompting import PromptThreads
from embferry.serve.language.transfer_source import TransferSource
from embferry.transfer.receive_handle import EmbeddingReceiver
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_handle import EmbeddingSender
from embferry.transfer.send_manager import SendManager
from tests.serve.pictures import encoded, noise, png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import events, generate_body, run
from tests.serve.workers.lying_peer import LyingPeer, offer

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}
OTHER = {"kind": "image", "data": png(80, 80, "blue")}

LIES: dict[str, Callable[[Frame, Open], bytes]] = {
    "one token more than the prompt has": lambda frame, asked: offer(frame, asked, 17),
    "2**31 tokens": lambda frame, asked: offer(frame, asked, 1 << 31),
    "the most tokens a message can name": lambda frame, asked: offer(frame, asked, MAX_TOKENS),
    "no digest": lambda frame, asked: offer(frame, asked, 16, content_digest=b""),
    "a transport of its own": lambda frame, asked: offer(frame, asked, 16, transport="own"),
    "no message": lambda frame, asked: secrets.token_bytes(64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_peer_costs_its_request_alone(join: MakeJoined, lie: str) -> None:
    joined = join(bootstrap_timeout=3, answer_timeout=3)
    item = {"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
    with LyingPeer(LIES[lie]) as peer:

        async def both() -> tuple[Any, Any]:
            body = generate_body({"room": 5, "endpoint": peer.endpoint, "items": [item]}, "what?")
            return await asyncio.gather(joined.post_generate(body), joined.ask("what?", PICTURE))

        response, answer = run(both())
        assert peer.answered
    error = events(response)[-1]["error"]
    wanted = {"no message": ("peer_gone", "lease_expired")}.get(lie, ("capacity_exhausted", "remote_protocol_error"))
    assert error["code"] in wanted, error
    assert answer.tokens == joined.reference("what?", PICTURE)
    assert run(joined.ask("what?", PICTURE)).tokens == answer.tokens
    assert joined.language.budget.held == 0


@pytest.mark.parametrize("grid", [[1, 1 << 31, 1 << 31], [1 << 31, 1 << 31, 1 << 31]])
def test_a_shape_beyond_all_bounds_is_refused(join: MakeJoined, grid: list[int]) -> None:
    joined = join()
    item = {"kind": "image", "grid_thw": grid, "num_tokens": 1 << 31, "timestamps": [], "digest": "00" * 16}
    body = generate_body({"room": 5, "endpoint": "tcp://127.0.0.1:1", "items": [item]}, "what?")
    response = run(joined.post_generate(body))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


ERRORS = (RuntimeError("a fault"), MemoryError(), OSError(24, "Too many open files"))

LANGUAGE_PLACES: dict[str, tuple[type, str]] = {
    "prompt": (PromptThreads, "build"),
    "open": (ReceiveManager, "open"),
    "init": (EmbeddingReceiver, "init"),
    "wake_on_change": (EmbeddingReceiver, "wake_on_change"),
    "buffered_chunks": (EmbeddingReceiver, "buffered_chunks"),
    "poll": (EmbeddingReceiver, "poll"),
    "schedule": (JobPipeline, "_schedule"),
    "read": (TransferSource, "read"),
    "available_tokens": (TransferSource, "available_tokens"),
    "release": (TransferSource, "release"),
    "count of a transfer": (LanguageMetrics, "transferred"),
    "end event": (Job, "end_event"),
    "clear": (EmbeddingReceiver, "clear"),
}


def fails_for_one(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, is_victim: Callable[..., bool]
) -> None:
    """Makes a method raise where its arguments belong to the victim, and work elsewhere."""
    real = getattr(owner, name)

    def method(*arguments: Any, **keywords: Any) -> Any:
        if is_victim(*arguments):
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, method)


def room_of(*arguments: Any) -> Any:
    """Returns the room to which the arguments of any of these methods belong, as far as one can tell."""
    for value in arguments:
        for found in (value, getattr(value, "request", None), getattr(value, "_receiver", None)):
            for key in ("room", "number"):
                if isinstance(number := getattr(found, key, None), int):
                    return number
    return next((value for value in arguments if isinstance(value, int)), None)


VICTIM = 77


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", LANGUAGE_PLACES)
def test_a_fault_in_the_language_worker_costs_its_request_alone(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    joined = join()
    fails_for_one(monkeypatch, *LANGUAGE_PLACES[place], error, lambda *arguments: room_of(*arguments) == VICTIM)

    async def both() -> tuple[list[dict[str, Any]], Any]:
        first = (await joined.post_encode(PICTURE, room=VICTIM)).json()
        response, answer = await asyncio.gather(
            joined.post_generate(generate_body(first, "what?")), joined.ask("what?", PICTURE, OTHER)
        )
        received = events(response) if response.status_code == 200 else [{"type": "error", **response.json()}]
        return received, answer

    received, answer = run(both())
    assert received[-1]["type"] == "error"
    assert answer.tokens == joined.reference("what?", PICTURE, OTHER)
    assert joined.language.fault is None
    monkeypatch.undo()
    joined.encode.abort_room(VICTIM)
    joined.wait(lambda: joined.language.load == 0 and joined.language.budget.held == 0)
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_caller_that_cannot_be_told_costs_its_request_alone(join: MakeJoined) -> None:
    joined = join()
    told: list[Any] = []

    def deliver(event: Any) -> None:
        told.append(event)
        if event is not ACCEPTED:
            raise RuntimeError("the caller is gone")

    body = json.dumps(generate_body({"items": []}, "hello"))
    joined.language.submit(language_process.messages.DECODER.decode(body), deliver)
    answer = run(joined.ask("what?", PICTURE))
    assert answer.tokens == joined.reference("what?", PICTURE)
    joined.wait(lambda: joined.language.load == 0)
    assert told


ENCODE_PLACES: dict[str, tuple[type, str]] = {
    "prepare": (EncodeService, "prepare"),
    "open": (SendManager, "open"),
    "init": (EmbeddingSender, "init"),
    "poll": (EmbeddingSender, "poll"),
    "send_embedding": (EmbeddingSender, "send_embedding"),
    "add": (Room, "add"),
    "count_bytes": (Room, "count_bytes"),
    "release": (Room, "release"),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ENCODE_PLACES)
def test_a_fault_in_the_encode_worker_costs_its_request_alone(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    joined = join()
    fails_for_one(monkeypatch, *ENCODE_PLACES[place], error, lambda *arguments: room_of(*arguments[::-1]) == VICTIM)

    async def victim() -> str:
        response = await joined.post_encode(PICTURE, room=VICTIM)
        if response.status_code != 200:
            return "error"
        received = events(await joined.post_generate(generate_body(response.json(), "what?")))
        return str(received[-1]["type"])

    async def both() -> tuple[str, Any]:
        return await asyncio.gather(victim(), joined.ask("what?", PICTURE, OTHER))

    ended, answer = run(both())
    assert ended == ("end" if place == "release" else "error")
    assert answer.tokens == joined.reference("what?", PICTURE, OTHER)
    assert joined.encode.fault is None
    joined.wait(lambda: joined.encode.load == 0)
    monkeypatch.undo()
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_transfer_that_cannot_even_be_aborted_costs_its_request_alone(
    join: MakeJoined, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join()

    def is_victim(sender: Any, *_: Any) -> bool:
        return bool(sender.room == VICTIM)

    fails_for_one(monkeypatch, EmbeddingSender, "send_embedding", RuntimeError("a fault"), is_victim)
    fails_for_one(monkeypatch, EmbeddingSender, "abort", RuntimeError("another fault"), is_victim)

    async def failed() -> None:
        first = (await joined.post_encode(PICTURE, room=VICTIM)).json()
        asking = asyncio.create_task(joined.post_generate(generate_body(first, "what?")))
        while joined.encode.load:
            await asyncio.sleep(0.001)
        joined.language.abort_room(VICTIM)
        assert events(await asking)[-1]["type"] == "error"

    run(failed())
    assert run(joined.ask("what?", PICTURE, OTHER)).tokens == joined.reference("what?", PICTURE, OTHER)


@pytest.mark.parametrize("side", ["encode", "language"])
def test_a_worker_without_a_working_transport_is_replaced(
    join: MakeJoined, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    """No single request is at fault: the service reports itself broken, so that the supervisor starts another."""
    joined = join()
    service = joined.encode if side == "encode" else joined.language
    with caplog.at_level(logging.CRITICAL + 1):
        service.manager.transports["memory"].lost = TransportError("it has failed")
        service.abort_room(1)
        service._wake.set()
        joined.wait(lambda: service.fault is not None)
    assert isinstance(service.fault, TransportError)
    service.fault = None  # the fixture checks for faults that the test did not cause
