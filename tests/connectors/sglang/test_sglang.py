"""SGLang's servers, divided by the plug-in, answer as an undivided server does, also when something breaks."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from embferry.connectors.sglang.parts import PartId
from tests.connectors.faulty_link import FaultyLink

from .servers import DIVIDED, PLUGIN, POOL_TOKENS, Server, ask, body, reason_of, tokens_of
from .stage import AT_LIMITS, QUESTIONS, WAIT_S, Stage, damaged, outcome_of, picture, running, wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

MIDDLE = 20_000
"""Bytes: less than an embedding of 48 tokens."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    with running(tmp_path_factory.mktemp("sglang"), make) as made:
        yield made


def link_of(stage: Stage) -> FaultyLink:
    assert stage.link is not None
    return stage.link


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tokens_are_those_of_one_server(stage: Stage, name: str) -> None:
    link_of(stage).new()
    assert stage.is_right(name)


@pytest.mark.parametrize("name", AT_LIMITS)
def test_pictures_at_the_limits_have_the_outcome_of_one_server(stage: Stage, name: str) -> None:
    assert {status for status, _ in stage.at_limits.values()} == {200, 400}
    response = ask(stage.language, AT_LIMITS[name])
    assert outcome_of(response) == stage.at_limits[name], response.text[:2000]
    assert stage.is_right("one")


def test_an_embedding_longer_than_the_pool_resumes(stage: Stage) -> None:
    before = stage.metrics()
    assert stage.is_right("large")
    after = stage.metrics()
    assert after["tokens_total"] - before["tokens_total"] == 400
    assert after["resumed_transfers_total"] - before["resumed_transfers_total"] >= 400 // POOL_TOKENS
    assert "completed with resumed transfer: 400 tokens" in stage.language.text()


def test_a_transfer_survives_a_cut_data_connection(stage: Stage) -> None:
    cuts: list[int] = []

    def cut(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not cuts:
            cuts.append(carried)
            return False
        return True

    link_of(stage).new(cut)
    assert stage.is_right("large")
    assert len(cuts) == 1
    link_of(stage).new()


def test_damaged_bytes_are_noticed(stage: Stage) -> None:
    damages: list[int] = []

    def damage(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not damages:
            damages.append(carried)
            data[len(data) // 2] ^= 1
        return True

    link_of(stage).new(damage)
    assert stage.is_right("large")
    assert len(damages) == 1
    link_of(stage).new()


def test_a_request_with_a_damaged_picture_fails_alone(stage: Stage) -> None:
    beside = stage.later([], tokens=200)
    for pictures in ([damaged(1)], [picture(1), damaged(2)], [damaged(3, 1000, 1000)]):  # the last is 2 MB
        refused = ask(stage.language, pictures)
        assert refused.status_code == 400
        assert re.search(r"Error while loading data .{,100}… .*image file is truncated", reason_of(refused))
    assert not re.search(r"the encoder at \S+ is lost", stage.language.text())
    assert len(tokens_of(beside.result(WAIT_S))) == 200
    assert stage.is_right("two")


def test_a_picture_that_cannot_be_fetched_fails_alone(stage: Stage) -> None:
    refused = ask(stage.language, ["http://127.0.0.1:9/none.png"])
    assert refused.status_code == 400
    assert "127.0.0.1" in reason_of(refused)
    assert stage.is_right("one")


def test_a_batch_of_requests(stage: Stage) -> None:
    one, another = body(QUESTIONS["one"]), body(QUESTIONS["another"])
    batch = one | {"text": [one["text"], another["text"]], "image_data": [one["image_data"], another["image_data"]]}
    response = httpx.post(f"{stage.language.url}/generate", json=batch, timeout=WAIT_S, trust_env=False)
    assert response.status_code == 200, response.text
    assert [each["output_ids"] for each in response.json()] == [stage.expected["one"], stage.expected["another"]]


def test_several_samples_are_refused(stage: Stage) -> None:
    request = body(QUESTIONS["one"])
    request["sampling_params"]["n"] = 2
    response = httpx.post(f"{stage.language.url}/generate", json=request, timeout=WAIT_S, trust_env=False)
    assert response.status_code == 400
    assert "send the request n times" in reason_of(response)


def test_an_abort_ends_its_request_alone(stage: Stage) -> None:
    stage.mark()
    with ExitStack() as stopped:
        for encoder in stage.encoders:
            stopped.enter_context(encoder.stopped())
        first = stage.later(QUESTIONS["one"], rid="req-1")
        tenth = stage.later(QUESTIONS["another"], rid="req-10")
        stage.wait_for_dispatch(2)
        stage.abort("req-1")
        assert (
            first.result(WAIT_S).status_code != 200
            or first.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
        )
        assert not tenth.done()
    assert tokens_of(tenth.result(WAIT_S)) == stage.expected["another"]


def test_the_id_of_an_aborted_request_can_be_used_again(stage: Stage) -> None:
    stage.mark()
    with ExitStack() as stopped:
        for encoder in stage.encoders:
            stopped.enter_context(encoder.stopped())
        first = stage.later(QUESTIONS["one"], rid="same")
        stage.wait_for_dispatch(1)
        stage.abort("same")
        first.result(WAIT_S)
        second = stage.later(QUESTIONS["another"], rid="same")
        stage.wait_for_dispatch(1)
    assert tokens_of(second.result(WAIT_S)) == stage.expected["another"]
    assert stage.is_right("another", rid="same")


def test_a_client_that_hangs_up_ends_its_request_alone(stage: Stage) -> None:
    stage.mark()
    with ExitStack() as stopped:
        for encoder in stage.encoders:
            stopped.enter_context(encoder.stopped())
        beside = stage.later([], tokens=500)
        with pytest.raises(httpx.ReadTimeout):
            ask(stage.language, QUESTIONS["one"], timeout=3)
        assert len(tokens_of(beside.result(WAIT_S))) == 500
    assert stage.is_right("two")


def test_an_encoder_gives_up_what_a_language_server_that_hangs_up_has_asked_for(stage: Stage) -> None:
    """As one does that is killed. SGLang would keep the embedding for 180 s."""
    encoder, part = stage.encoders[0], PartId("gone", "ab" * 16, 0).text
    request = {"req_id": part, "mm_items": QUESTIONS["one"], "modality": "IMAGE", "num_parts": 1, "part_idx": 0}
    to = {"encoder_idx": 0, "prefill_host": "127.0.0.1", "embedding_port": None}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{encoder.url}/encode", json=request | to, timeout=3, trust_env=False)
    wait_until(lambda: f"Cleaning up resources for req_id {part}" in encoder.text())


def test_an_encoder_that_stands_still_is_passed_over(stage: Stage) -> None:
    """On a busy machine, it may still be taken for lost after an earlier test, and get nothing: then once more."""

    def fails_over() -> bool:
        before = stage.metrics().get('failovers_total{outcome="found"}', 0)
        with stage.encoders[0].stopped():
            assert stage.is_right("two")
        return stage.metrics().get('failovers_total{outcome="found"}', 0) > before

    wait_until(fails_over)
    assert f"the encoder at {stage.encoders[0].url} is lost" in stage.language.text()
    wait_until(lambda: stage.is_right("two"))


def test_an_encoder_that_is_killed_in_the_middle_of_a_transfer(stage: Stage) -> None:
    """Each encoder has one of the two pictures. It must run before the last tests: the first encoder is gone then."""
    killed: list[int] = []

    def kill(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not killed:
            killed.append(carried)
            stage.encoders[0].signal(signal.SIGKILL)
        return True

    link_of(stage).new(kill)
    both = [picture(8, 560, 560), picture(9, 560, 560)]
    answer = tokens_of(ask(stage.language, both))
    assert killed
    link_of(stage).new()
    assert answer == tokens_of(ask(stage.language, both))


def test_an_encoder_that_is_gone_does_not_matter(stage: Stage) -> None:
    for name in ("one", "another", "two", "three"):
        assert stage.is_right(name)


def test_without_encoders_a_request_fails_alone_and_says_why(stage: Stage) -> None:
    stage.encoders[1].signal(signal.SIGKILL)
    refused = stage.later(QUESTIONS["one"])
    assert stage.is_right("text")
    assert refused.result(WAIT_S).status_code == 503
    assert "is lost" in reason_of(refused.result())


def test_an_encoder_that_comes_back_is_used_again(stage: Stage) -> None:
    gone = stage.encoders[1]
    gone.close()
    log = gone.log.with_name("encoder-again.log")
    with Server(stage.model, log, ["--encoder-only", *DIVIDED], PLUGIN, port=gone.port) as again:
        again.started()
        assert stage.is_right("three")
