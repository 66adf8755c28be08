"""vLLM on Ray: an instance that encodes and one that answers, on nodes of their own, beside an undivided server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.serve.config import RouterSettings, VllmSettings
from embferry.serve.http.address import get
from embferry.serve.supervisor.vllm import MIDDLEWARE
from tests.deploy.ray.conftest import RAY, START, RayCluster, measured, wait
from tests.ports import free_port
from tests.serve.vllm.servers import ENVIRONMENT, KEY, VLLM, Servers, picture, video
from tests.serve.vllm.stubs import text

pytestmark = [*RAY, pytest.mark.ray_vllm]

CONTENTS = {
    "one": [picture(1), text()],
    "two": [picture(2), text("and"), picture(3, 448, 224), text()],
    "a video": [video(6, 4), text()],
    "none": [text()],
}


class OnRay(Servers):
    """The application on Ray, and an undivided server."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self._prepare(folder, {})
        self._cluster = cluster
        self.undivided = f"http://127.0.0.1:{free_port()}"
        serve = (str(Path(sys.executable).with_name("vllm")), "serve", str(folder / "model"), *VLLM)
        port = self.undivided.rpartition(":")[2]
        self.start(
            *(folder / "undivided.log", *serve, "--middleware", MIDDLEWARE),
            *("--enable-mm-embeds", "--host", "127.0.0.1", "--port", port),
        )

    @property
    def url(self) -> str:
        return self._cluster.url


@pytest.fixture(scope="session")
def key() -> str:
    """The cluster key, which the undivided server has in its environment."""
    return KEY.written()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The variables of every node that vLLM needs on a machine without a GPU."""
    return {name: value for name, value in ENVIRONMENT.items() if not name.startswith("EMBFERRY_")}


@pytest.fixture(scope="module")
def servers(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    folder = tmp_path_factory.mktemp("vllm")
    running = OnRay(folder, cluster)
    try:
        changes = {
            "model": str(folder / "model"),
            "router": RouterSettings(engine="vllm", request_timeout=START),
            "vllm": VllmSettings(transports=("tcp",)),
            "ray": cluster.settings.ray.model_copy(update={"vllm_arguments": VLLM}),
        }
        cluster.run(cluster.settings.model_copy(update=changes))
        wait(lambda: get(running.undivided, "/health", START)[0] == 200, "the undivided server", START)
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("what", CONTENTS)
def test_the_tokens_are_those_of_the_undivided_model(servers: OnRay, what: str) -> None:
    expected = servers.tokens(servers.undivided, *CONTENTS[what])
    assert len(expected) == 16
    for stream in (False, True):
        assert servers.tokens(servers.url, *CONTENTS[what], stream=stream) == expected


def test_pictures_are_encoded_on_another_node_than_that_of_the_answer(servers: OnRay, cluster: RayCluster) -> None:
    (encoder,), (language,) = cluster.workers("encode"), cluster.workers("language")
    assert encoder["url"] != language["url"]
    assert measured(encoder["url"], "vllm:request_success_total") > 0
    assert measured(language["url"], "vllm:request_success_total") > 0
