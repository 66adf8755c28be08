"""Our engine on three Ray nodes: it answers as one process does, also when the node of an encode worker is lost."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import httpx
import pytest

from tests.deploy.ray.conftest import DEADLINE, RAY, START, RayCluster, measured, wait
from tests.deploy.ray.questions import Question, ask, asking

pytestmark = RAY

HOLDING = r"embferry_(?:encode_rooms|language_requests)\b"


@pytest.fixture(scope="module")
def running(cluster: RayCluster) -> RayCluster:
    """The application with an encode worker on each of two nodes."""
    ray = cluster.settings.ray.model_copy(update={"min_encoders": 2, "max_encoders": 2})
    cluster.run(cluster.settings.model_copy(update={"ray": ray}))
    wait(lambda: cluster.count("encode") == 2, "two encode workers", START)
    return cluster


def pid_of(worker: dict[str, Any]) -> int:
    """Returns the number of the process of a worker, which its id begins with."""
    return int(worker["id"].split("-")[1])


def test_answers_on_three_nodes_are_those_of_one_process(running: RayCluster, asked: list[Question]) -> None:
    nodes = {running.node_of(pid_of(worker)).node_id for worker in running.workers("encode")}
    assert len(nodes) == 2
    for stream in (False, True):
        for question in asked:
            assert ask(running.url, question, stream=stream)[0] == "", question.part["type"]
    assert running.total("embferry_router_transfers_total.*resumed") > 0


def test_a_stream_arrives_event_by_event_and_ends_when_its_client_leaves(running: RayCluster) -> None:
    """Ray's proxy passes on each event at once, and tells the router when a client has left."""
    message = {"role": "user", "content": "tell me everything"}
    options = {"model": "shapes", "max_tokens": 1000, "ignore_eos": True, "stream": True, "messages": [message]}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=options, timeout=DEADLINE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        seen = [json.loads(line[6:]) for line in (next(lines) for _ in range(8)) if line]
        assert seen[-1]["choices"][0]["finish_reason"] is None
        (language,) = running.workers("language")
        assert measured(language["url"], HOLDING) == 1  # the answer is still being computed
    wait(lambda: measured(language["url"], HOLDING) == 0, "the end of the abandoned answer")


def test_a_body_of_many_megabytes_passes_the_proxy(running: RayCluster) -> None:
    body = {"model": "shapes", "messages": [{"role": "user", "content": "x" * (40 << 20)}]}
    response = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=START, trust_env=False)
    assert response.status_code == 400
    assert "characters" in response.json()["error"]["message"]


def under_way(cluster: RayCluster, encoder: str) -> dict[str, Any] | None:
    """Returns a request whose embedding this encoder has sent in part; None if there is none."""
    for request in cluster.json("/activity")["requests"]:
        told = request["transfer"]
        is_sent = told is not None and 0 < told["tokens"] < told["total_tokens"]
        if request["ended"] is None and request["encoders"] == [encoder] and is_sent:
            return dict(request)
    return None


def hold_a_transfer(cluster: RayCluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stops an encode worker while one of its embeddings has arrived in part.

    Returns:
        The worker, and the request.
    """

    def held() -> tuple[dict[str, Any], dict[str, Any]] | None:
        for worker in cluster.workers("encode"):
            if under_way(cluster, worker["id"]) is not None:
                os.kill(pid_of(worker), signal.SIGSTOP)
                if (request := under_way(cluster, worker["id"])) is not None:
                    return worker, request
                os.kill(pid_of(worker), signal.SIGCONT)
        return None

    found: tuple[dict[str, Any], dict[str, Any]] = wait(held, "a transfer under way")
    return found


def test_a_node_killed_in_the_middle_of_transfers_costs_no_request(running: RayCluster, asked: list[Question]) -> None:
    longest = asked[:1]
    with asking(running.url, longest, clients=4) as clients:
        worker, request = hold_a_transfer(running)
        node = running.node_of(pid_of(worker))
        running.kill_node(node)
        wait(lambda: worker["id"] not in {one["id"] for one in running.workers("encode")}, "the end of the worker")
        done = clients.count
        wait(lambda: clients.count >= done + 8, "answers of the other encode worker")
    assert clients.wrong == []
    (ended,) = [one for one in running.json("/activity")["requests"] if one["number"] == request["number"]]
    (other,) = [one["id"] for one in running.workers("encode")]
    assert (ended["outcome"], ended["attempts"], ended["encoders"]) == ("answered", 2, [other])


def test_ray_replaces_the_lost_encode_worker_when_there_is_a_node_again(
    running: RayCluster, asked: list[Question]
) -> None:
    running.encoder_nodes.append(running.add_node())
    wait(lambda: running.count("encode") == 2, "a second encode worker", START)
    before = {one["id"]: measured(one["url"], "embferry_encode_rooms_ended_total") for one in running.workers("encode")}
    with asking(running.url, asked[1:], clients=4) as clients:
        wait(
            lambda: all(
                measured(one["url"], "embferry_encode_rooms_ended_total") > before[one["id"]]
                for one in running.workers("encode")
            ),
            "work for both",
        )
    assert clients.wrong == []


def test_a_worker_that_dies_is_replaced_and_costs_no_request(running: RayCluster, asked: list[Question]) -> None:
    victim = running.workers("encode")[0]
    with asking(running.url, asked[1:], clients=4) as clients:
        os.kill(pid_of(victim), signal.SIGKILL)
        wait(lambda: victim["id"] not in {one["id"] for one in running.workers("encode")}, "the end of the worker")
        wait(lambda: running.count("encode") == 2, "another one", START)
    assert clients.wrong == []
