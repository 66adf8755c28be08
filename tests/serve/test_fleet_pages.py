"""A router's pages about its workers: their list, Prometheus' service discovery, and their pools."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from embferry.observe.metrics import ChatMetrics, RouterMetrics
from embferry.serve.vllm.metrics import VllmRouterMetrics
from tests.serve.conftest import CLIENT_TIMEOUT
from tests.serve.fakes import POOL, Deployment
from tests.serve.vllm.stubs import Stub, routed

PAGES = ("/workers", "/sd", "/debug/pool")


@pytest.mark.integration
def test_the_workers_are_listed_with_their_urls(deployment: Deployment, http: httpx.Client) -> None:
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    workers = http.get("/workers").json()["workers"]
    assert [(one["id"], one["role"], one["url"]) for one in workers] == [
        ("encode0", "encode", f"{deployment.fake_url}/encode0"),
        ("language0", "language", f"{deployment.fake_url}/language0"),
    ]
    assert workers[0] | {"id": "", "url": ""} == {
        "id": "", "role": "encode", "url": "", "models": ["shapes"], "up": True, "in_flight": 0, "load": 0.0,
        "trouble": "",
    }  # fmt: skip


@pytest.mark.integration
def test_prometheus_finds_router_and_workers(deployment: Deployment, http: httpx.Client) -> None:
    """The format is that of ``http_sd_configs``: a list of objects with ``targets`` and ``labels``, all text."""
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    answer = http.get("/sd")
    assert answer.headers["content-type"] == "application/json"
    router, *workers = answer.json()
    host = deployment.url.removeprefix("http://")
    assert router == {
        "targets": [host],
        "labels": {
            "__scheme__": "http", "__metrics_path__": "/metrics", "part": "router", "worker": deployment.url,
        },
    }  # fmt: skip
    assert [one["labels"]["worker"] for one in workers] == ["encode0", "language0"]
    assert workers[1]["targets"] == [deployment.fake_url.removeprefix("http://")]
    assert workers[1]["labels"]["__metrics_path__"] == "/language0/metrics"
    scraped = httpx.get(
        f"{router['labels']['__scheme__']}://{router['targets'][0]}{router['labels']['__metrics_path__']}",
        trust_env=False,
        timeout=CLIENT_TIMEOUT,
    )
    assert b"embferry_router_workers" in scraped.content


@pytest.mark.integration
def test_the_pools_are_asked_for_through_the_router(deployment: Deployment, http: httpx.Client) -> None:
    deployment.workers = [deployment.entry(name) for name in ("encode0", "language0", "language1")]
    deployment.wait(lambda: http.get("/ready").json()["workers"]["language"] == 2)
    deployment.fakes["language1"].refusal = (503, {})
    first, second = http.get("/debug/pool").json()["pools"]
    assert first == {"worker": "language0", "url": f"{deployment.fake_url}/language0", **POOL}
    assert second == {"worker": "language1", "url": f"{deployment.fake_url}/language1", "error": "status 503"}


@pytest.mark.integration
@pytest.mark.parametrize("deployment", [{"api_key": "right"}], indirect=True)
@pytest.mark.parametrize("path", PAGES)
def test_addresses_within_the_cluster_need_an_api_key(deployment: Deployment, http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 401
    assert http.get(path, headers={"Authorization": "Bearer right"}).status_code == 200
    assert http.get("/metrics").status_code == 200


def test_instances_of_vllm_are_listed_and_found_too() -> None:
    async def scenario() -> None:
        encoder, language, down = Stub("e1", "encode"), Stub("l1", "language"), Stub("l2", "language", up=False)
        async with routed(encoder, language, down) as router:
            workers: list[dict[str, Any]] = (await router.get("/workers")).json()["workers"]
            assert [(one["role"], one["up"], one["models"]) for one in workers] == [
                ("encode", True, ["tiny"]), ("language", True, ["tiny"]), ("language", False, []),
            ]  # fmt: skip
            assert [one["id"] for one in workers] == [one["url"] for one in workers]
            assert workers[2]["trouble"]
            _, *groups = (await router.get("/sd")).json()
            assert [group["labels"]["part"] for group in groups] == ["encode", "language", "language"]
            refused = await router.get("/debug/pool")
            assert (refused.status, refused.json()["error"]["code"]) == (404, "not_found")
            assert "metrics_port" in refused.json()["error"]["message"]

    asyncio.run(scenario())


@pytest.mark.parametrize("roles", [("encode", "encode", "language"), ("encode", "prefill", "decode", "decode")])
def test_prometheus_finds_the_connectors_of_instances(roles: tuple[str, ...]) -> None:
    """Each has a server of its own, and the label ``worker`` of its instance."""

    async def scenario() -> None:
        stubs = [Stub(f"i{number}", role) for number, role in enumerate(roles)]
        pages = tuple(f"http://10.0.0.2:{9100 + number}" for number in range(len(stubs)))
        async with routed(*stubs, connector_metrics_urls=pages) as router:
            _, *groups = (await router.get("/sd")).json()
            instances, connectors = groups[: len(stubs)], groups[len(stubs) :]
            assert [group["labels"]["part"] for group in instances] == list(roles)
            assert connectors == [
                {
                    "targets": [f"10.0.0.2:{9100 + number}"],
                    "labels": {
                        "__scheme__": "http", "__metrics_path__": "/metrics", "part": "connector", "worker": stub.url,
                    },
                }
                for number, stub in enumerate(stubs)
            ]  # fmt: skip
            listed = (await router.get("/workers")).json()["workers"]
            assert [worker["id"] for worker in listed] == [group["labels"]["worker"] for group in connectors]

    asyncio.run(scenario())


def names(metrics: ChatMetrics) -> dict[str, str]:
    """Returns the help of each metric by its name."""
    return {family.name: family.documentation for family in metrics.registry.collect()}


def test_both_routers_have_the_same_metrics_for_the_same_things() -> None:
    common, ours, before_vllm = names(ChatMetrics()), names(RouterMetrics()), names(VllmRouterMetrics())
    assert common.items() <= ours.items()
    assert common.items() <= before_vllm.items()
    assert ours.keys() & before_vllm.keys() == common.keys()
    for needed in ("http_requests", "chat_errors", "chat_seconds", "media_items", "workers", "worker_failures"):
        assert f"embferry_router_{needed}" in common
