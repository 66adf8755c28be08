"""Second attempts: which workers they go to, and when they are not made."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import BREAK, DAMAGE, Deployment, closed_port, tokens

pytestmark = pytest.mark.integration

QUESTION = user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?")
BODY = {"model": "shapes", "messages": QUESTION}


def error(code: str, status: int = 503) -> dict[str, Any]:
    return {"type": "error", "error": {"message": f"failed with {code}", "code": code, "status": status}}


LOSSES: dict[str, list[Any]] = {
    "lost": [[BREAK]],
    "lost during the answer": [[*tokens("a ", "blue "), BREAK]],
    "damaged": [[DAMAGE]],
    "damaged twice": [[DAMAGE], [DAMAGE]],
    "told to end": [[error("worker_ending")]],
    "told to end during the answer": [[*tokens("a "), error("worker_ending")]],
}
"""Scripts of the language worker that is asked first."""


def ready(deployment: Deployment, http: httpx.Client, **loads: float) -> None:
    """Registers these workers with their loads."""
    deployment.workers = [deployment.entry(name, load=load) for name, load in loads.items()]
    counts = {role: sum(name.startswith(role) for name in loads) for role in ("encode", "language")}
    deployment.wait(lambda: http.get("/ready").json()["workers"] == counts)


def asked(deployment: Deployment) -> dict[str, int]:
    return {name: len(fake.requests) for name, fake in deployment.fakes.items()}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_encode_worker_that_made_the_embedding_is_asked_again(
    deployment: Deployment, http: httpx.Client, loss: str, stream: bool
) -> None:
    ready(deployment, http, encode0=0, encode1=0, language0=0, language1=5)
    deployment.fakes["language0"].scripts = [list(script) for script in LOSSES[loss]]
    answer = http.post("/v1/chat/completions", json=BODY | {"stream": stream})
    if stream and "during" in loss:
        assert answer.status_code == 200  # the client has tokens of the first attempt
        assert '"error"' in answer.text
        assert sum(asked(deployment).values()) == 2
        return
    assert answer.status_code == 200
    counts = asked(deployment)
    attempts = 1 + len(LOSSES[loss])
    assert sorted((counts["encode0"], counts["encode1"])) == [0, attempts]
    assert counts["language1"] == (0 if loss == "damaged" else 1)


def test_a_lost_encode_worker_is_not_asked_again(deployment: Deployment, http: httpx.Client) -> None:
    ready(deployment, http, encode0=0, encode1=5, language0=0)
    deployment.fakes["language0"].scripts = [[error("peer_gone")]]
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200
    assert (asked(deployment)["encode0"], asked(deployment)["encode1"]) == (1, 1)


def test_a_worker_that_ends_is_named_if_there_is_no_other(deployment: Deployment, http: httpx.Client) -> None:
    deployment.fakes["language0"].script = [error("worker_ending")]
    answer = http.post("/v1/chat/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_ending")
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("content", [QUESTION, user("hello")], ids=["picture", "text"])
@pytest.mark.parametrize("how", ["no lease", "lost", "refuses"])
def test_nothing_is_encoded_for_a_request_that_no_language_worker_can_take(
    deployment: Deployment, http: httpx.Client, how: str, content: Any
) -> None:
    """The first attempt of a request whose worker is lost has encoded; a second one is not made."""
    if how == "no lease":
        ready(deployment, http, encode0=0)
    deployment.fakes["language0"].refusal = BREAK if how == "lost" else None
    if how == "refuses":
        deployment.fakes["language0"].refusal = (503, error("capacity_exhausted"))
    answer = http.post("/v1/chat/completions", json={"model": "shapes", "messages": content})
    assert answer.status_code in (502, 503)
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    has_encoded = content is QUESTION and how != "no lease"
    assert asked(deployment)["encode0"] == has_encoded


def test_a_killed_worker_whose_lease_lasts_costs_one_request(deployment: Deployment, http: httpx.Client) -> None:
    """The request that finds out. Later ones ask it whether it is back, before anything is done for them."""
    with closed_port() as closed:
        gone = deployment.entry("language0", url=closed)
        deployment.workers = [deployment.entry("encode0"), gone]
        deployment.wait(lambda: closed in http.get("/workers").text)
        for _ in range(3):
            answer = http.post("/v1/chat/completions", json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
            assert closed in answer.json()["error"]["message"]
        assert asked(deployment)["encode0"] == 1
    deployment.workers = [deployment.entry("encode0"), deployment.entry("language0")]
    deployment.wait(lambda: closed not in http.get("/workers").text)
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200  # although it has failed lately


@pytest.mark.parametrize("deployment", [{"media": {"allowed_hosts": ("127.0.0.1",)}}], indirect=True)
def test_no_file_is_fetched_for_a_request_that_no_language_worker_can_take(
    deployment: Deployment, http: httpx.Client
) -> None:
    ready(deployment, http, encode0=0)
    content = user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "?")
    answer = http.post("/v1/chat/completions", json={"model": "shapes", "messages": content})
    assert answer.json()["error"]["code"] == "no_worker"  # not fetch_failed
