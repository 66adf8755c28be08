from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.serve.supervisor import LocalCluster
from embferry.trust import ClusterKeys, Key, Trust
from tests.serve.workers.test_processes import SETTINGS
from tests.strangers.canary import Canary
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger


@pytest.fixture(scope="package")
def listed() -> Iterator[Canary]:
    """A server that the operator of the cluster has listed by its full name."""
    with Canary() as canary:
        yield canary


@pytest.fixture(scope="package")
def private() -> Iterator[Canary]:
    """A server whose port is listed for every public host, at an address that is none."""
    with Canary() as canary:
        yield canary


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory, listed: Canary, private: Canary) -> Iterator[Running]:
    """The one cluster, with a key, for all acts of strangers."""
    key = Key.new()
    transfer = SETTINGS.transfer.model_copy(update={"transports": ("tcp", "http")})
    hosts = (f"127.0.0.1:{listed.port}", f"*:{private.port}")
    media = SETTINGS.media.model_copy(update={"allowed_hosts": hosts})
    settings = SETTINGS.model_copy(update={"transfer": transfer, "media": media})
    logs: Path = tmp_path_factory.mktemp("strangers") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBFERRY_CLUSTER_KEY", key.written())
        cluster = LocalCluster(settings, logs=logs)
    with cluster:
        cluster.wait_ready()
        yield Running(cluster, Trust(ClusterKeys(key)))


@pytest.fixture
def stranger(running: Running) -> Stranger:
    return Stranger(running)
