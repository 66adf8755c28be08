"""Events about the embedding of a request, for a router that asks for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.language import job as jobs
from embferry.serve.router.worker_events import parse_event
from embferry.transports.contract import Transport
from tests.serve.pictures import encoded, noise
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import Joined, events, generate_body, run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}


def line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode()


async def ask(joined: Joined, **more: Any) -> list[dict[str, Any]]:
    described = (await joined.post_encode(PICTURE)).json()
    return events(await joined.post_generate(generate_body(described, "what is there?") | more))


def test_progress_grows_up_to_the_transfer_of_the_answer(
    join: MakeJoined, transport: type[Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_SECONDS", 0.0)
    told = run(ask(join(transport, num_blocks=2, block_size=3), progress=True))
    seen = [event for event in told if event["type"] == "progress"]
    *before, last = seen
    transfer = told[-1]["transfer"]
    assert (last["tokens"], last["total_tokens"]) == (transfer["total_tokens"],) * 2
    assert last["transfers"] == transfer["initial"] + transfer["resumed"]
    assert {event["bytes"] for event in seen} == {transfer["bytes"]}
    assert {event["transport"] for event in seen} == {transfer["transport"]}
    assert [event["tokens"] for event in seen] == sorted({event["tokens"] for event in before} | {last["tokens"]})
    assert [event["transfers"] for event in seen] == sorted(event["transfers"] for event in seen)
    assert 0 <= last["seconds"] <= told[-1]["timing"]["total"]
    assert not any("seconds" in event for event in before)
    for event in seen:
        assert parse_event(line(event)) == event


def test_a_fast_transfer_is_told_of_once_and_before_the_first_token(join: MakeJoined) -> None:
    told = run(ask(join(), progress=True))
    types = [event["type"] for event in told]
    assert 1 <= types.count("progress") <= 2
    assert types[0] == "progress"


def test_a_router_that_does_not_ask_hears_of_no_progress(join: MakeJoined) -> None:
    assert {event["type"] for event in run(ask(join()))} == {"token", "end"}


GOOD = {"type": "progress", "tokens": 1, "total_tokens": 2, "transfers": 1, "bytes": 9, "transport": "shm"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": -1}, {"tokens": True}, {"tokens": 1.5}, {"total_tokens": None}, {"bytes": 1 << 63}, {"transport": 5},
        {"seconds": 1.0}, {"ago": 1.0}, {"seconds": -1.0, "ago": 0.0}, {"seconds": "1", "ago": 0.0},
        {"seconds": float("inf"), "ago": 0.0}, {"seconds": 1.0, "ago": float("nan")},
    ],
)  # fmt: skip
def test_progress_that_is_malformed_is_refused(wrong: dict[str, Any]) -> None:
    assert parse_event(line(GOOD)) == GOOD
    with pytest.raises(ServeError, match="malformed"):
        parse_event(line(GOOD | wrong))
