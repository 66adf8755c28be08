"""Measuring a deployment over real sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from embferry.plan.deployment import Deployment
from embferry.plan.errors import MeasuringFailed
from embferry.plan.files import read_model
from embferry.plan.measuring import GAP_S, REPEATS, Target
from embferry.plan.probes import ANSWER, TOGETHER, WORDS
from tests.bench.serving import stub_endpoint as stub

pytestmark = pytest.mark.integration

LISTED = {"/v1/models": '{"data": [{"id": "m"}]}'}
ENCODE, LANGUAGE = {"role": "encode", "up": True}, {"role": "language", "up": True}


def router(*workers: Mapping[str, object], phases: list[list[object]] | None = None) -> dict[str, str]:
    """Returns the documents of a router."""
    told = {"workers": workers, "requests": [{"phases": phases or []}] * REPEATS}
    return LISTED | {"/activity": json.dumps(told)}


def target(url: str, told: list[str] | None = None, waited: list[float] | None = None) -> Target:
    tell, wait = [] if told is None else told, [] if waited is None else waited
    return Target(url, read_model("shapes"), "", {"ignore_eos": True}, "", tell.append, wait.append)


def test_an_undivided_engine_is_asked_for_everything() -> None:
    bodies, told, waited = [], list[str](), list[float]()

    def answer(request: stub.Request) -> None:
        bodies.append(request.body)
        request.answer([5] * request.body["max_tokens"])

    with stub.serving(answer, LISTED) as url:
        found = target(url, told, waited).times()
    assert waited == [GAP_S] * (REPEATS * (len(WORDS) + 1)), "each request that is sent alone finds an idle engine"
    assert found.deployment == Deployment(0, 1)
    assert len(found.texts) == len(WORDS)
    assert [one.visual for one in found.pictures] == [64], "the model has no larger ones"
    assert [one.requests for one in found.steps] == [1, TOGETHER]
    assert all(one.seconds > 0 for one in found.steps)
    assert len(found.bursts) == 1
    assert len(found.bursts[0].asked) == TOGETHER
    assert all(one.engine is None for one in found.texts), "this server has no metrics of vLLM"
    assert {body["max_tokens"] for body in bodies} >= {1, ANSWER}
    assert all(body["ignore_eos"] is True for body in bodies)
    texts = [body["messages"][0]["content"][-1]["text"] for body in bodies if body["max_tokens"] == 1]
    assert len({*texts}) == len(texts), "no cache of prefixes may answer"
    assert "warming" in told


def test_a_router_tells_its_instances_and_its_transfers() -> None:
    def answer(request: stub.Request) -> None:
        request.answer([5] * request.body["max_tokens"])

    phases: list[list[object]] = [["encode", 0.0, 1.0], ["transfer", 1.0, 1.25], ["prefill", 1.25, None]]
    with stub.serving(answer, router(ENCODE, ENCODE, LANGUAGE, phases=phases)) as url:
        found = target(url).times()
    assert found.deployment == Deployment(2, 1)
    assert [one.transfer for one in found.pictures] == [0.25]


def test_a_router_without_an_encoder_is_refused() -> None:
    with (
        stub.serving(lambda request: request.answer([1]), router(LANGUAGE)) as url,
        pytest.raises(MeasuringFailed, match="has no encoder"),
    ):
        target(url).times()


def test_a_request_that_fails_is_told() -> None:
    with (
        stub.serving(lambda request: request.refuse(503, '{"error": {"message": "full"}}'), LISTED) as url,
        pytest.raises(MeasuringFailed, match=r"does not answer \(warming\): HTTP 503: full"),
    ):
        target(url).times()


def test_an_engine_that_tells_its_prefill_is_believed() -> None:
    documents, count = dict(LISTED), 0

    def answer(request: stub.Request) -> None:
        nonlocal count
        count += 1
        documents["/metrics"] = (
            "# TYPE vllm:request_prefill_time_seconds histogram\n"
            f"vllm:request_prefill_time_seconds_sum {count * 0.25}\nvllm:request_prefill_time_seconds_count {count}\n"
            "# TYPE vllm:time_to_first_token_seconds histogram\n"
            f"vllm:time_to_first_token_seconds_sum {count}\nvllm:time_to_first_token_seconds_count {count}\n"
        )
        request.answer([5] * request.body["max_tokens"])

    with stub.serving(answer, documents) as url:
        found = target(url).times()
    assert {one.engine for one in found.texts} == {0.25}
    assert [one.engine for one in found.pictures] == [0.25]


def test_no_server_is_told() -> None:
    with pytest.raises(MeasuringFailed, match="lists no model"):
        target("http://127.0.0.1:9")
