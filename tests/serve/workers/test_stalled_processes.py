"""Workers that are stopped (SIGSTOP) while others of their role go on, and peers that lie to a worker."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest

from embferry.serve.config import RouterSettings, ServeSettings
from embferry.serve.supervisor import LocalCluster, ProcessView
from tests.serve.digested import digested
from tests.serve.workers.joined import DEADLINE, events, generate_body
from tests.serve.workers.lying_peer import LyingPeer
from tests.serve.workers.test_one_request_alone import LIES
from tests.serve.workers.test_processes import SETTINGS, START, ask, image, long_video, wait

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(1800)]

TWO = SETTINGS.model_copy(
    update={
        "serve": ServeSettings(restart_delay=0.1, start_timeout=START, encode_workers=2, language_workers=2),
        "router": RouterSettings(port=0, poll_interval=0.1, request_timeout=START),
        "transfer": SETTINGS.transfer.model_copy(
            update={"num_blocks": 4, "block_size": 16, "transports": ("shm", "tcp")}
        ),
    }
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(TWO, logs=tmp_path_factory.mktemp("stalled") / "log") as running:
        running.wait_ready(START)
        yield running


def of_role(cluster: LocalCluster, role: str) -> list[ProcessView]:
    return [view for view in cluster.workers if view.role == role]


def known(cluster: LocalCluster) -> dict[str, int]:
    ready = httpx.get(f"{cluster.url}/ready", timeout=DEADLINE, trust_env=False).json()
    return dict(ready["workers"])


@contextlib.contextmanager
def stopped(view: ProcessView) -> Iterator[None]:
    os.kill(view.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(view.pid, signal.SIGCONT)


@pytest.mark.parametrize("role", ["encode", "language"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_worker_is_passed_over(cluster: LocalCluster, role: str, number: int) -> None:
    """One of two workers is stopped: every request is answered, although the router asks the stopped one too."""
    wait(lambda: known(cluster) == {"encode": 2, "language": 2}, "all workers registered")
    with stopped(of_role(cluster, role)[number]):
        for _ in range(3):
            response = ask(cluster, image())
            assert response.status_code == 200, response.text


@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_worker_that_is_stopped_midway_costs_no_request(cluster: LocalCluster, role: str) -> None:
    """Four requests with videos run when one worker is stopped; the client has received nothing of them yet."""
    wait(lambda: known(cluster) == {"encode": 2, "language": 2}, "all workers registered")
    answers: list[httpx.Response] = []
    asking = [
        threading.Thread(target=lambda: answers.append(ask(cluster, long_video())), daemon=True) for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    wait(lambda: any(in_use(view) for view in of_role(cluster, "language")), "a transfer in progress")
    with stopped(of_role(cluster, role)[0]):
        for thread in asking:
            thread.join(START)
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.text[:300] for answer in answers]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def in_use(view: ProcessView) -> int:
    pool = httpx.get(f"{view.url}/debug/pool", timeout=DEADLINE, trust_env=False).json()
    return int(pool["used"])


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_peer_does_not_end_a_language_worker(cluster: LocalCluster, lie: str) -> None:
    worker = of_role(cluster, "language")[0]
    item = {"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}
    with LyingPeer(LIES[lie]) as peer:
        body = generate_body({"room": secrets.randbits(60), "endpoint": peer.endpoint, "items": [item]}, "what?")
        response = httpx.post(f"{worker.url}/generate", json=body, timeout=START, trust_env=False, auth=digested)
        assert peer.answered
    assert events(response)[-1]["type"] == "error"
    body = generate_body({"items": []}, "hello")
    response = httpx.post(f"{worker.url}/generate", json=body, timeout=START, trust_env=False, auth=digested)
    assert events(response)[-1]["type"] == "end"
    assert of_role(cluster, "language")[0].starts == worker.starts


def test_all_blocks_are_free_at_the_end(cluster: LocalCluster) -> None:
    def free() -> bool:
        pools = [httpx.get(f"{view.url}/debug/pool", timeout=DEADLINE, trust_env=False).json() for view in languages]
        return all(pool["available"] == pool["num_blocks"] for pool in pools)

    languages = of_role(cluster, "language")
    wait(free, "no block in use")
