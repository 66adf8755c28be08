"""A worker whose encodes all fail says so within seconds, and refuses requests; one that is busy never does."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from embferry.engine.encoder import Encoder
from embferry.serve.encode import self_test
from embferry.serve.errors import ServeError
from tests.serve.pictures import encoded, noise
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import Joined, client, run

PICTURE = {"kind": "image", "data": encoded(noise(96, 64))}


class Failing:
    """An encoder that fails for some items. ``fails``: all of them, ``tokens`` only those of this length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = True
        self.tokens: int | None = None
        whole = Encoder.encode

        def encode(encoder: Encoder, item: Any) -> Any:
            if self.fails and self.tokens in (None, item.num_tokens):
                raise RuntimeError("the device has fallen off the bus")
            return whole(encoder, item)

        monkeypatch.setattr(Encoder, "encode", encode)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test take as long as this machine needs."""
    monkeypatch.setattr(self_test, "WAIT_SECONDS", 60)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


async def ready(joined: Joined) -> tuple[int, dict[str, Any]]:
    async with client(joined.encode_app) as http:
        response = await http.get("/ready")
    return response.status_code, json.loads(response.content)


def test_a_worker_that_has_encoded_nothing_yet_tries(join: MakeJoined, failing: Failing) -> None:
    joined = join()
    status, told = run(ready(joined))
    assert (status, told["ready"]) == (503, False)
    assert "fallen off the bus" in told["reason"]
    failing.fails = False
    assert run(ready(joined))[0] == 200
    assert joined.encode.cache.counters.misses == 0


def test_a_success_counts_for_a_while(join: MakeJoined, failing: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join()
    failing.fails = False
    assert run(joined.ask("what?", PICTURE)).status == 200
    failing.fails = True
    assert run(ready(joined))[0] == 200
    monkeypatch.setattr(self_test, "FRESH_SECONDS", 0)
    assert run(ready(joined))[0] == 503


def test_a_worker_whose_encodes_fail_refuses_requests_until_one_succeeds(join: MakeJoined, failing: Failing) -> None:
    joined = join()
    assert run(joined.ask("what?", PICTURE)).last["type"] != "end"
    joined.wait(lambda: joined.encode.self_test.trouble is not None)
    refused = run(joined.post_encode(PICTURE))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_unfit")
    assert refused.json()["error"]["retryable"] is True
    failing.fails = False
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)
    assert run(ready(joined))[0] == 200


def test_a_picture_that_cannot_be_encoded_is_not_the_workers_fault(join: MakeJoined, failing: Failing) -> None:
    joined = join()
    (item,) = run(joined.post_encode(PICTURE, room=5)).json()["items"]
    joined.encode.abort_room(5)
    failing.tokens = item["num_tokens"]
    assert run(joined.ask("what?", PICTURE)).last["type"] != "end"
    assert run(ready(joined))[0] == 200
    failing.fails = False
    assert run(joined.ask("what?", PICTURE)).tokens == joined.reference("what?", PICTURE)


def test_a_decoder_that_fails_is_noticed(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join()

    def fail(*_: Any) -> None:
        raise ServeError("media_decoder_failed", "it has ended")

    with monkeypatch.context() as patched:
        patched.setattr("embferry.serve.media.decoding.media.image", fail)
        assert run(joined.post_encode(PICTURE)).status_code == 400
        joined.wait(lambda: joined.encode.self_test.trouble is not None)
        assert "decoder" in run(ready(joined))[1]["reason"]
    assert run(ready(joined))[0] == 200


def test_a_busy_worker_is_ready(join: MakeJoined, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder thread is in the middle of something long, and no test could run."""
    joined = join()
    begun, release, whole = threading.Event(), threading.Event(), Encoder.encode

    def slow(encoder: Encoder, item: Any) -> Any:
        begun.set()
        release.wait()
        return whole(encoder, item)

    monkeypatch.setattr(Encoder, "encode", slow)
    monkeypatch.setattr(self_test, "FRESH_SECONDS", 0)
    monkeypatch.setattr(self_test, "WAIT_SECONDS", 0.01)
    asking = threading.Thread(target=lambda: run(joined.ask("what?", PICTURE)))
    asking.start()
    assert begun.wait(60)
    assert run(ready(joined))[0] == 200
    test = joined.encode.self_test.begin()
    assert run(ready(joined))[0] == 200
    assert not test.done()
    release.set()
    asking.join()
    test.result(60)


def test_a_test_that_is_dropped_at_the_end_of_the_worker_is_over(join: MakeJoined) -> None:
    joined = join()
    joined.encode.close()
    joined.encode.self_test.begin().result(60)
    assert joined.encode.self_test.trouble is None
