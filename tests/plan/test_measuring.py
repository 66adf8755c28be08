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
    return Target(url, read_model("shapes"), "", {"ignore_eos": True}, "", tell.append, wait=wait.append)


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


def test_a_server_that_counts_more_tokens_than_were_asked_for_is_refused() -> None:
    """Each would be played through, one step after the other."""

    def answer(request: stub.Request) -> None:
        request.open()
        request.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        request.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 10**12}})
        request.event("[DONE]")

    with stub.serving(answer, LISTED) as url, pytest.raises(MeasuringFailed, match="at most 4 tokens has 1,000,000"):
        target(url).times()


def test_a_server_that_counts_a_prompt_of_billions_is_refused() -> None:
    def answer(request: stub.Request) -> None:
        request.open()
        request.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        request.event({"choices": [], "usage": {"prompt_tokens": 10**12, "completion_tokens": 1}})
        request.event("[DONE]")

    with stub.serving(answer, LISTED) as url, pytest.raises(MeasuringFailed, match="a prompt has 1,000,000,000,000"):
        target(url).times()


@pytest.mark.parametrize(
    "event",
    [
        "[1]",
        '{"choices": {"a": 1}}',
        '{"choices": ["x"]}',
        '{"choices": [{"delta": "x"}]}',
        '{"choices": [{"delta": {"content": 1}}]}',
        '{"choices": [{"delta": {}, "token_ids": 1}]}',
        '{"usage": [1]}',
        '{"sglext": [1]}',
        '{"sglext": {"output_ids": 1}}',
        "[" * 100_000,
    ],
)
def test_a_stream_of_another_form_is_told(event: str) -> None:
    def answer(request: stub.Request) -> None:
        request.open()
        request.event(event)
        request.event("[DONE]")

    with stub.serving(answer, LISTED) as url, pytest.raises(MeasuringFailed, match="a chunk"):
        target(url).times()


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from embferry.bench.serving import client

    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1 << 20)

    def answer(request: stub.Request) -> None:
        request.open()
        while not request.ended.is_set():
            request.event({"choices": [{"index": 0, "delta": {"content": "x" * 10_000}}]})

    def refusal(request: stub.Request) -> None:
        while not request.ended.is_set():
            request.refuse(500, "x" * 10_000)

    for kind in (answer, refusal):
        with stub.serving(kind, LISTED) as url, pytest.raises(MeasuringFailed, match="more than 1,048,576 bytes"):
            target(url).times()


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        '{"workers": 1}',
        '{"workers": ["x"]}',
        '{"workers": [], "requests": {"a": 1}}',
        '{"workers": [], "requests": [{"phases": [["transfer"]]}]}',
        '{"workers": [], "requests": [{"phases": [["transfer", "a", "b"]]}]}',
    ],
)
def test_what_is_no_activity_of_a_router_is_an_undivided_engine(told: str) -> None:
    with stub.serving(lambda request: request.answer([1]), LISTED | {"/activity": told}) as url:
        assert target(url).deployment == Deployment(0, 1)


def test_a_router_with_more_instances_than_can_be_played_is_refused() -> None:
    many = router(*[ENCODE] * 100, LANGUAGE)
    with (
        stub.serving(lambda request: request.answer([1]), many) as url,
        pytest.raises(MeasuringFailed, match="101 instances"),
    ):
        target(url).times()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1e300", "x"])
def test_metrics_without_sense_count_for_nothing(value: str) -> None:
    documents, count = dict(LISTED), 0

    def answer(request: stub.Request) -> None:
        nonlocal count
        count += 1
        documents["/metrics"] = (
            f"vllm:request_prefill_time_seconds_sum {value if count % 2 else 0}\n"
            f"vllm:time_to_first_token_seconds_count {count}\n"
        )
        request.answer([5] * request.body["max_tokens"])

    with stub.serving(answer, documents) as url:
        assert {one.engine for one in target(url).times().texts} <= {None, 0.0}
