"""Real processes with a cluster key: they answer, and a stranger at any of their ports gets nothing."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import pytest

from embferry.serve.supervisor import LocalCluster
from embferry.trust.keys import Key
from tests.serve.pictures import png
from tests.serve.workers.test_processes import SETTINGS, START, ask, image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    transfer = SETTINGS.transfer.model_copy(update={"transports": ("http",)})
    with LocalCluster(SETTINGS.model_copy(update={"transfer": transfer})) as cluster:
        cluster.wait_ready()
        yield cluster


def test_a_cluster_with_a_key_answers_and_lets_no_stranger_in(cluster: LocalCluster) -> None:
    answer = ask(cluster, image())
    assert answer.status_code == 200, answer.text
    encode, language = (next(one.url for one in cluster.workers if role in one.name) for role in ("encode", "language"))
    item = {"kind": "image", "data": png(64, 64, "red")}
    body = msgspec.msgpack.encode({"room": 1, "request_id": "x", "items": [item]})
    with httpx.Client(trust_env=False, timeout=START) as stranger:
        for url in (encode, language, cluster.bootstrap_url):
            assert stranger.get(f"{url}/health").status_code == 200
            assert stranger.get(f"{url}/metrics").status_code == 200
        refused = [
            stranger.post(f"{encode}/encode", content=body),
            stranger.get(f"{encode}/embeddings/1"),
            stranger.delete(f"{encode}/rooms/1"),
            stranger.post(f"{language}/generate", json={"room": None, "request_id": "x", "messages": []}),
            stranger.get(f"{language}/debug/pool"),
            stranger.get(f"{cluster.bootstrap_url}/workers"),
            stranger.put(f"{cluster.bootstrap_url}/workers/evil", json={"id": "evil", "role": "encode"}),
        ]
        assert [one.status_code for one in refused] == [401] * len(refused)
        assert all(one.json()["error"]["code"] == "proof_required" for one in refused)
        assert 'embferry_cache_lookups_total{outcome="miss"} 1.0' in stranger.get(f"{encode}/metrics").text
    assert ask(cluster, image()).status_code == 200
